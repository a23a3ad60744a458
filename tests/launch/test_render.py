"""The rendered job script: what stands in it, and that no value is read as anything but text."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mf_train.errors import UserError
from mf_train.launch.options import JobOptions
from mf_train.launch.render import TEMPLATE, JobFolders, quote, render, render_job

OPTIONS = JobOptions(nodes=2, gpus_per_node=4, time="1:00:00")
PLACE = JobFolders(run="/runs/a", common="/runs/a", directory="/home/me/project")
ARRAY = JobFolders(run="/runs/seed-{task}", common="/runs/seed-array", directory="/home/me")
NASTY = '/runs/it\'s "a" $(touch broken) `touch broken` ; touch broken # 100%'


def rendered(options: JobOptions = OPTIONS, folders: JobFolders = PLACE, **changes: object) -> str:
    values: dict[str, object] = {
        "notice": 180,
        "node_counts": [2],
        "python": "/env/bin/python",
        "head": "Head.",
    }
    return render_job(options, folders, **(values | changes))  # type: ignore[arg-type]


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def run_settings(text: str, folder: Path, **variables: str) -> dict[str, str]:
    """The settings as bash reads them; of an array its words, one a line."""
    lines = text.splitlines()
    block = lines[lines.index("# --- settings ---") : lines.index("# --- end of settings ---")]
    names = [line.split("=")[0] for line in block if not line.startswith("#")]
    shown = [f"printf '%s\\n' \"${{{name}[@]}}\"; printf '\\0'" for name in names]
    script = folder / "settings.sh"
    script.write_text("\n".join([*block, *shown]))
    done = subprocess.run(
        ["bash", str(script)],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    values = [value.removesuffix("\n") for value in done.stdout.split("\0")]
    return dict(zip(names, values, strict=False))


def test_directives_of_a_gpu_job() -> None:
    assert directives(rendered()) == [
        "--job-name=a",
        "--chdir=/home/me/project",
        "--output=/runs/a/launch/logs/%j.out",
        "--open-mode=append",
        "--nodes=2",
        "--gpus-per-node=4",
        "--time=1:00:00",
        "--mem=0",
        "--signal=B:USR1@180",
        "--exclusive",
        "--requeue",
    ]


def test_directives_of_what_was_asked_for() -> None:
    options = JobOptions(
        nodes=4,
        tasks_per_node=3,
        cpus_per_task=5,
        exclusive=False,
        partition="long",
        account="lab",
        qos="high",
        array="0-2%1",
        job_name="my job",
        dependency="afterok:12",
        sbatch=("--constraint=a&b", "--mail-type=ALL", "--contiguous"),
    )
    found = directives(rendered(options, ARRAY))
    assert {
        '--job-name="my job"',
        "--output=/runs/seed-array/launch/logs/%A_%a.out",
        "--nodes=4",
        "--ntasks-per-node=3",
        "--cpus-per-task=5",
        "--partition=long",
        "--account=lab",
        "--qos=high",
        "--array=0-2%1",
        "--dependency=afterok:12",
        "--kill-on-invalid-dep=yes",
        "--requeue",
        '--constraint="a&b"',
        "--mail-type=ALL",
        "--contiguous",
    } <= set(found)
    assert not {"--exclusive", "--mem=0"} & set(found) and not any("time" in line for line in found)


def test_an_elastic_job_asks_for_no_tasks() -> None:
    """SLURM would remember their number, and a requeued job would wait for as many nodes as it had."""
    found = directives(rendered(replace(OPTIONS, nodes=1, elastic=(2, 4))))
    assert "--nodes=2-4" in found and not any("task" in line for line in found)


def test_the_settings_are_what_bash_reads(tmp_path: Path) -> None:
    options = replace(OPTIONS, starter="srun", elastic=(1, 2), nodes=2, retries=5)
    values = run_settings(rendered(options, node_counts=[1, 2]), tmp_path)
    assert values == {
        "run": "/runs/a",
        "code": "/runs/a/launch/code",
        "python": "/env/bin/python",
        "starter": "srun",
        "per_node": "4",
        "cores": "",
        "node_counts": "1 2",
        "retries": "5",
        "notice": "180",
        "srun_options": "",
        "prefix": "",
        "arguments": "/runs/a/launch/config.yaml",
    }


@pytest.mark.parametrize(("asked", "cores"), [(None, 16), (6, 6)])
def test_cores_are_the_node_s_shared_out_or_what_was_asked_for(
    asked: int | None, cores: int, tmp_path: Path
) -> None:
    """A job that has its nodes alone gets all their cores, however few it asked for."""
    text = rendered(replace(OPTIONS, cpus_per_task=asked, elastic=(1, 2), nodes=2))
    assert run_settings(text, tmp_path)["cores"] == str(asked or "")
    lines = text.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("node_cpus="))
    last = next(index for index, line in enumerate(lines) if line.startswith("export OMP_NUM_THREADS="))
    (setting,) = [line for line in lines if line.startswith("cores=")]
    script = "\n".join([setting, "per_node=4", *lines[first : last + 1], "echo $OMP_NUM_THREADS"])
    environment = {"SLURM_JOB_CPUS_PER_NODE": "96,64(x3)", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(cores)


def test_an_arrays_task_has_its_own_run(tmp_path: Path) -> None:
    values = run_settings(rendered(OPTIONS, ARRAY), tmp_path, SLURM_ARRAY_TASK_ID="7")
    assert values["run"] == "/runs/seed-7"
    assert values["code"] == "/runs/seed-array/launch/code"
    assert values["arguments"] == "/runs/seed-7/launch/config.yaml"


def test_no_value_breaks_out(tmp_path: Path) -> None:
    options = replace(OPTIONS, container=f"{NASTY}.sif", container_mounts=("/a b:/c$d",), job_name=NASTY)
    text = rendered(options, JobFolders(run=NASTY, common=NASTY, directory="/home/$me"), python=NASTY)
    values = run_settings(text, tmp_path)
    assert values["run"] == values["python"] == NASTY
    assert values["arguments"] == f"{NASTY}/launch/config.yaml"
    assert values["prefix"].splitlines()[-1] == f"{NASTY}.sif"
    assert "/a b:/c$d" in values["prefix"].splitlines()
    assert not (tmp_path / "broken").exists()
    subprocess.run(["bash", "-n"], input=text, text=True, timeout=30, check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_no_error(tmp_path: Path) -> None:
    (tmp_path / "job.sbatch").write_text(rendered())
    done = subprocess.run(
        ["shellcheck", "--severity=error", "job.sbatch"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


def test_the_rest_is_the_template_unchanged() -> None:
    """But for the head, the #SBATCH lines and the values of the settings."""
    before, after = TEMPLATE.read_text().splitlines(), rendered().splitlines()
    assert after[0] == "#!/bin/bash" and after[1] == "# Head."
    end = "# --- end of settings ---"
    assert after[after.index(end) :] == before[before.index(end) :]
    assert sum(line.startswith("#SBATCH") for line in after) == len(directives("\n".join(after)))


def test_apptainer_mounts_what_the_job_needs(tmp_path: Path) -> None:
    values = run_settings(
        rendered(replace(OPTIONS, container="image.sif"), ARRAY), tmp_path, SLURM_ARRAY_TASK_ID="1"
    )
    words = values["prefix"].splitlines()
    assert words[:3] == ["apptainer", "exec", "--nv"] and words[-1] == "image.sif"
    assert {"/home/me:/home/me", "/runs/seed-1:/runs/seed-1", "/runs/seed-array:/runs/seed-array"} <= set(
        words
    )
    options = replace(OPTIONS, container="image.sif", gpus_per_node=None, tasks_per_node=2)
    assert "--nv" not in run_settings(rendered(options), tmp_path)["prefix"]


def test_other_images_are_pyxis_and_enroots(tmp_path: Path) -> None:
    options = replace(
        OPTIONS, container="nvcr.io#nvidia/pytorch:25.01-py3", container_mounts=("/data:/data:ro",)
    )
    values = run_settings(rendered(options), tmp_path)
    assert values["srun_options"].splitlines() == [
        "--container-image=nvcr.io#nvidia/pytorch:25.01-py3",
        "--container-mounts=/home/me/project:/home/me/project,/runs/a:/runs/a,/data:/data:ro",
        "--container-workdir=/home/me/project",
    ]
    assert values["prefix"] == ""
    with pytest.raises(UserError, match="/runs/a,b: a folder that is mounted"):
        rendered(options, replace(PLACE, run="/runs/a,b"))


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (replace(PLACE, common="/runs/100%"), "--output=/runs/100%%/launch/logs/%j.out"),
        (replace(PLACE, directory='/a "b"'), r'--chdir="/a \"b\""'),
        (replace(PLACE, directory="/a#b"), '--chdir="/a#b"'),
    ],
)
def test_what_sbatch_reads_specially_is_escaped(folders: JobFolders, expected: str) -> None:
    assert expected in directives(rendered(folders=folders))


@pytest.mark.parametrize("path", ["/runs/a\nb", "/runs/a\\b"])
def test_paths_that_sbatch_cannot_read_are_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"sbatch cannot read|SLURM cannot write"):
        rendered(folders=replace(PLACE, common=path))


def test_a_template_that_does_not_fit_is_an_error() -> None:
    template = TEMPLATE.read_text()
    with pytest.raises(ValueError, match="no setting nothing"):
        render(template, ["#SBATCH --nodes=1"], {"nothing": "1"}, "")
    with pytest.raises(ValueError, match="one block"):
        render(template.replace("set -u", "#SBATCH --nodes=1\nset -u"), [], {}, "")


def test_quoting() -> None:
    assert quote("") == "''"
    assert quote("{task}") == '"$SLURM_ARRAY_TASK_ID"'
    assert quote("a b{task}") == "'a b'\"$SLURM_ARRAY_TASK_ID\""
