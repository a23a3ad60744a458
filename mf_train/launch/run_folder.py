"""Prints a configuration's run folder, for the job script: `python -m mf_train.launch.run_folder CONFIG ...`."""

import sys

from mf_train.config.loading import load_config
from mf_train.errors import UserError

if __name__ == "__main__":
    try:
        print(load_config(sys.argv[1], sys.argv[2:]).training.output_dir)
    except UserError as error:
        sys.exit(f"memoryformer: {error}")
