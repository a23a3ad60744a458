"""`python -m mf_train` is `memoryformer`; torchrun starts it so."""

from mf_train.cli import main

if __name__ == "__main__":
    main()
