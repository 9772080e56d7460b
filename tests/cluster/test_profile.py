"""Cluster profiles: what is refused and how it is said; every shipped one is read."""

from pathlib import Path

import pytest

from lorabench.cluster.profile import Profile, packing, read_profile
from lorabench.config.decode import InputError, decode, encode

SHIPPED = sorted((Path(__file__).parents[2] / "slurm").glob("*.toml"))


def problems(text: str, tmp_path: Path, **changes: object) -> list[str]:
    file = tmp_path / "profile.toml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_profile(file, changes)
    assert str(caught.value).startswith(f"{file}: ")
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minutes = 0", "minutes = 0: must be at least 1"),
        ("minutes = 1.5", "minutes = 1.5: must be a valid integer"),
        ("mem_gib = 0.0", "mem_gib = 0.0: must be greater than 0"),
        ('mem_gib = "64GB"', 'mem_gib = "64GB": must be a valid number'),
        ("gpus = -1", "gpus = -1: must be at least 0"),
        ("parallell = 4", "parallell = 4: unknown key 'parallell'. Did you mean 'parallel'?"),
        ('kind = "slrum"', "kind = \"slrum\": unknown value 'slrum'. Did you mean 'slurm'?"),
        ("signal_seconds = 60\nminutes = 1", "signal_seconds = 60: must be less than the job's 1 min"),
        ("gpus = 2\nranks_per_node = 4", "ranks_per_node = 4: must be at most gpus = 2"),
        ('gpus = 0\ngpu_type = "a100"', 'gpu_type = "a100": there are none, with gpus = 0'),
        ("gpus = 2\ncells_at_once = 2", "cells_at_once = 2: must be 1 where a run takes 2 ranks"),
        ('kind = "local"\npartition = "gpu"', 'partition = "gpu": only kind = "slurm" has it'),
        ('kind = "local"\nnodes = 2', 'nodes = 2: must be 1 with kind = "local"'),
        ('extra.mem = "4G"', 'extra.mem = "4G": use mem_gib'),
        ('extra.open_mode = "truncate"', "extra.open_mode = \"truncate\": is lorabench's"),
        ('environment."A B" = "1"', 'environment.A B = "1": must be named by letters, digits and _'),
        ('partition = "a b"', 'partition = "a b": must be a text without spaces'),
        ('cells_per_job = "some"', "cells_per_job = \"some\": must be a valid integer or unknown value 'some'"),
        ('setup = "module load cuda"', 'setup = "module load cuda": must be a list'),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_may_stand_there(text: str, message: str, tmp_path: Path) -> None:
    found = problems(text, tmp_path)
    assert len(found) == 1
    assert found[0].startswith(message)


def test_all_problems_are_told_at_once_also_those_of_the_command_line(tmp_path: Path) -> None:
    found = problems('gpus = -1\ncpus = "four"\nqoss = "x"', tmp_path, minutes=0)
    assert [problem.partition(" ")[0] for problem in found] == ["qoss", "gpus", "cpus", "minutes"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such cluster profile. Choices: "), ("gpus = = 1", "not valid TOML"), ("\xff", "cannot be read")],
)
def test_a_file_that_is_no_profile_is_told(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "nowhere.toml"
    (tmp_path / "a100.toml").write_text("")
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        read_profile(file)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_profile_is_valid_says_what_it_is_for_and_survives_json(file: Path) -> None:
    assert "Edit:" in file.read_text()
    profile = read_profile(file)
    assert decode(Profile, encode(profile)) == profile


def test_four_kinds_are_shipped() -> None:
    assert {file.stem for file in SHIPPED} >= {"a100", "h100", "cpu", "local"}


def test_defaults_are_one_gpu_and_one_rank_and_no_gpu_means_the_cpu() -> None:
    assert (Profile().world_size, Profile().run_device) == (1, "cuda")
    assert (Profile(gpus=0).world_size, Profile(gpus=0).run_device) == (1, "cpu")
    assert Profile(gpus=4, nodes=2).world_size == 8
    assert Profile(gpus=4, ranks_per_node=1, cells_at_once=4).world_size == 1


def test_a_job_packs_the_runs_that_no_ranks_share() -> None:
    auto = packing(Profile(gpus=0, cells_at_once=3))
    assert (auto.size, auto.device, auto.workers) == (None, "cpu", 3)
    assert packing(Profile(pack=4)).size == 4
    assert packing(Profile(pack="off")).size == packing(Profile(gpus=2)).size == 1


def test_what_is_asked_of_the_cluster_is_in_the_script(tmp_path: Path) -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    profile = Profile(
        partition="gpu", account="me", qos="long", constraint="a100&nvlink", exclude="n[1-3]", nodes=2, gpus=4,
        gpu_type="a100", cpus=6, mem_gib=1.5, minutes=90, signal_seconds=120, setup=["module load cuda"],
        environment={"HF_HOME": "/scratch/my models"}, extra={"reservation": "course", "exclusive": True},
        requeue=False,
    )  # fmt: skip
    text = _make_sbatch_string(command="python", folder=tmp_path, **profile.slurm_parameters("n", "c", 7, tmp_path))
    for line in (
        "--partition=gpu", "--account=me", "--qos=long", "--constraint='a100&nvlink'", "--exclude='n[1-3]'",
        "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=a100:4", "--cpus-per-task=6", "--mem=1536M", "--time=90",
        "--signal=USR2@120", "--no-requeue", "--reservation=course", "--exclusive", "--comment=c", "--job-name=n",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert "wckey" not in text and "#SBATCH --requeue" not in text
    lines = text.splitlines()
    assert lines.index("export HF_HOME='/scratch/my models'") < lines.index("module load cuda")
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=6 --kill-on-bad-exit=1 python" in srun
