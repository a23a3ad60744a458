"""What is set for torch and Triton before a run on GPUs, and that the user's own settings stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mf_train.errors import UserError
from mf_train.training import environment as environment_module
from mf_train.training.environment import (
    CACHE,
    private_folder,
    set_allocator,
    set_flight_recorder,
    set_kernel_cache,
    set_waiting,
    temporary_folder,
)
from tests.training.runs import REPOSITORY, environment, small_config, write_text

NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def test_the_allocator_is_set_where_the_user_has_not() -> None:
    given: dict[str, str] = {}
    set_allocator(given)
    assert given == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        own = {name: "max_split_size_mb:64"}
        set_allocator(own)
        assert own == {name: "max_split_size_mb:64"}


def test_the_flight_recorder_is_set_where_the_user_has_not(tmp_path: Path) -> None:
    given: dict[str, str] = {}
    set_flight_recorder(given, tmp_path / "collectives-")
    assert given == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/collectives-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for size, file in [
        ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
    ]:
        own = {size: "0", file: "mine-", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
        set_flight_recorder(own, tmp_path)
        assert own == {size: "0", file: "mine-", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}


def test_threads_sleep_beside_other_programs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    busy: list[float | None] = [1.0]
    monkeypatch.setattr(environment_module, "busy_processors", lambda: busy[0])
    monkeypatch.setattr(environment_module, "usable_processors", lambda: 4)
    given: dict[str, str] = {}
    assert "1.0 of 4 processors busy" in set_waiting(given)
    assert given == {"OMP_WAIT_POLICY": "passive"}
    for own in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "9"}, {"OMP_NUM_THREADS": "1"}):
        before = dict(own)
        assert not set_waiting(own) and own == before
    for busy[0], processors in ((0.4, 4), (None, 4), (3.0, 64)):
        monkeypatch.setattr(environment_module, "usable_processors", lambda number=processors: number)
        given = {}
        assert not set_waiting(given) and not given


@pytest.mark.parametrize("module", ["mf_train.cli", "mf_train.launch.rank"])
def test_the_allocator_is_set_before_torch_is_imported(module: str, tmp_path: Path) -> None:
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["training"]["device"] = "auto"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    code = (
        f"import os, sys, {module}, mf_train.cli, mf_train.training.environment as environment\n"
        "original = environment.set_allocator\n"
        "def look(given):\n"
        "    original(given)\n"
        "    print('torch' in sys.modules, os.environ.get('PYTORCH_CUDA_ALLOC_CONF'), flush=True)\n"
        "    os._exit(0)\n"
        "environment.set_allocator = look\n"
        f"mf_train.cli.main(['train', {str(tmp_path / 'run.yaml')!r}, *sys.argv[1:]])\n"
    )
    own = {key: value for key, value in environment().items() if not key.endswith("ALLOC_CONF")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=own, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False", "expandable_segments:True"], done.stderr


def test_torch_takes_the_setting_by_this_name() -> None:
    """A wrong value is an error once the allocator's settings are read: in every version that reads the name."""
    code = "import torch; torch._C._accelerator_getAllocatorSettings()"
    own = environment() | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:Perhaps"}
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, timeout=120)
    if "has no attribute" in done.stderr:
        pytest.skip("this torch does not tell its settings")
    assert "Perhaps" in done.stderr


def test_kernels_are_kept_in_a_private_folder_of_the_node(tmp_path: Path) -> None:
    given = {"TMPDIR": str(tmp_path)}
    set_kernel_cache(given)
    folder = Path(given[CACHE])
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    again = {"TMPDIR": str(tmp_path)}
    set_kernel_cache(again)
    assert again == given, "all processes of a node share one"
    own = {CACHE: "/somewhere", "TMPDIR": str(tmp_path)}
    set_kernel_cache(own)
    assert own[CACHE] == "/somewhere"


def test_a_temporary_folder_that_is_not_on_this_node_is_left_out(tmp_path: Path) -> None:
    assert temporary_folder({"TMPDIR": str(tmp_path)}) == tmp_path
    assert temporary_folder({"TMPDIR": "/no/such/folder"}) == temporary_folder({}) == Path("/tmp")


def test_a_name_that_is_taken_is_not_trusted(tmp_path: Path) -> None:
    uid = os.geteuid()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (tmp_path / f"cache-{uid}").symlink_to(elsewhere)
    (tmp_path / f"cache-{uid}-1").write_text("")
    (tmp_path / f"cache-{uid}-2").mkdir(mode=0o700)
    (tmp_path / f"cache-{uid}-2").chmod(0o770)
    taken = 3
    if uid == 0:  # who may give a folder away
        (tmp_path / f"cache-{uid}-3").mkdir(mode=0o700)
        os.chown(tmp_path / f"cache-{uid}-3", 12345, -1)
        taken = 4
    assert private_folder(tmp_path, "cache") == tmp_path / f"cache-{uid}-{taken}"
    assert private_folder(tmp_path, "cache") == tmp_path / f"cache-{uid}-{taken}"
    for number in range(taken, 100):
        path = tmp_path / f"cache-{uid}-{number}"
        path.rmdir() if path.is_dir() else None
        path.write_text("")
    with pytest.raises(UserError, match=r"TRITON_CACHE_DIR"):
        private_folder(tmp_path, "cache")


def test_a_parent_in_which_others_may_replace_it_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match=r"sticky.*TRITON_CACHE_DIR"):
        private_folder(tmp_path, "cache")
    tmp_path.chmod(0o1777)
    assert private_folder(tmp_path, "cache").is_dir()


@NOT_ROOT
def test_a_parent_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"Permission denied.*TRITON_CACHE_DIR"):
        private_folder(tmp_path, "cache")
    tmp_path.chmod(0o700)


def test_a_parent_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Not a directory.*TRITON_CACHE_DIR"):
        private_folder(tmp_path / "file", "cache")
