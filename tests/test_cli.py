"""The command line: quick and useful help, flags that reach the stage, errors of one line."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

from cosa_fast import __version__, cli
from cosa_fast.config import Config, config_from_mapping, to_flags
from cosa_fast.distributed import OthersGone
from cosa_fast.stages import STAGES, Stage

COMMANDS = [stage.command for stage in STAGES]
TRAIN = ["train", "--index", "i.json", "--output", "o.safetensors", "--resume", "r"]


def field_names(stage: type[Stage]) -> list[str]:
    return [field.name for field in dataclasses.fields(stage)]


def cosa_fast(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run([sys.executable, "-m", "cosa_fast.cli", *words], capture_output=True, text=True, **options)


@pytest.fixture(autouse=True)
def _contained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a command does to its process."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def stage_code(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the code of `cosa-fast train`; its `train` is replaced by the tests."""
    module = ModuleType("cosa_fast.training.single_stage")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_help_is_quick_and_lists_every_stage() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = cosa_fast("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert not [command for command in COMMANDS if f"  {command}  " not in done.stdout]
    # CPU time, because other processes may hold the cores: 0.35 s; importing torch alone takes ten times that.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    stage = next(stage for stage in STAGES if stage.command == command)
    assert " ".join((stage.__doc__ or "missing").split()) in text
    for name in field_names(stage):
        section = getattr(Config(), name, None)
        if not isinstance(section, BaseModel):
            # A path's flag is followed by its docstring, not by "(required)" at once.
            flag = name.rstrip("_").replace("_", "-")
            assert re.search(rf"--{flag} (\S+|\[\S+ \[\S+ \.\.\.\]\]) [A-Z]", text), name
            continue
        for key, field in type(section).model_fields.items():
            assert f"--{name}.{key.replace('_', '-')} " in text
            assert " ".join((field.description or "").split()) in text


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys\nfrom cosa_fast.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'numpy', 'timm', 'zarr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cosa-fast {__version__}\n"


@pytest.mark.parametrize(("words", "message"), [([], "usage: cosa-fast"), (["data"], "'data' is not a stage")])
def test_no_stage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES, ids=COMMANDS)
def test_flags_of_the_workflow_give_back_its_configuration(stage: type[Stage]) -> None:
    config = config_from_mapping(
        {
            "voc": {"root": "/my data", "eval_splits": ["a", "b"]},
            "coco": {"eval_splits": []},
            "cosa": {"raw": False, "dynamic_threshold": False, "ignore_band": [0.2, 0.6], "label_size": 48},
            "model": {"pretrained": False, "weights": "w.safetensors"},
            "multistage": {"encoder_weights": None},
            "eval": {"threshold": 0.4},
        }
    )
    names = [name for name in field_names(stage) if isinstance(getattr(config, name, None), BaseModel)]
    required = [field.name for field in dataclasses.fields(stage) if field.default is dataclasses.MISSING]
    paths = [f"--{name} x" for name in required if name not in (*names, "threads")]
    parsed = cli._parse(stage, shlex.split(" ".join([to_flags(config, *names), *paths])))
    assert {name: getattr(parsed, name) for name in names} == {name: getattr(config, name) for name in names}


def test_flags_override_files_and_later_files_earlier_ones(stage_code: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {iterations: 9, batch_size: 3, seed: 1}\nthreads: 7\n")
    (tmp_path / "b.yaml").write_text("train: {batch_size: 5, seed: 2}\n")
    calls: list[dict[str, Any]] = []
    stage_code.train = lambda *paths, **settings: calls.append({"paths": paths, **settings})  # type: ignore[attr-defined]
    files = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    assert cli.main([*TRAIN, *files, "--train.seed", "3", "--cosa.swap", "False"]) == 0
    (call,) = calls
    train = call["train"]
    assert (train.iterations, train.batch_size, train.seed) == (9, 5, 3)
    assert (call["cosa"].swap, call["threads"]) == (False, 7)
    assert call["paths"] == (Path("i.json"), Path("o.safetensors"), Path("r"), None, None, None)


def test_a_stage_tells_its_time_and_memory(
    stage_code: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage_code.train = lambda *paths, **settings: None  # type: ignore[attr-defined]
    log = tmp_path / "logs/train.log"
    assert cli.main([*TRAIN, "--log", str(log)]) == 0
    text = capsys.readouterr().err
    assert log.read_text() == text
    assert re.search(r"^\d\d:\d\d:\d\d train: started \(cosa-fast \S+, threads 2\)$", text, re.MULTILINE)
    assert re.search(r"train: finished in \d+\.\d s, peak memory \d+\.\d\d GiB", text)


@pytest.mark.parametrize("error", [ValueError("too few"), OSError(28, "No space left on device")])
def test_bad_input_is_one_line(
    error: Exception,
    stage_code: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*paths: Path, **settings: Any) -> None:
        raise error

    stage_code.train = fail  # type: ignore[attr-defined]
    log = tmp_path / "train.log"
    monkeypatch.delenv("COSA_FAST_DEBUG", raising=False)
    assert cli.main([*TRAIN, "--log", str(log)]) == 1
    line = f"cosa-fast train: error: {error}"
    assert capsys.readouterr().err.splitlines()[1:] == [line]
    assert log.read_text().splitlines()[1:] == [line]
    monkeypatch.setenv("COSA_FAST_DEBUG", "1")
    assert cli.main(TRAIN) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(stage_code: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    stage_code.train = lambda *paths, **settings: 1 / 0  # type: ignore[attr-defined]
    assert cli.main(TRAIN) == 1
    text = capsys.readouterr().err
    assert "cosa-fast train: failed unexpectedly" in text
    assert "ZeroDivisionError" in text


def test_interrupted(stage_code: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*paths: Path, **settings: Any) -> None:
        raise KeyboardInterrupt

    stage_code.train = interrupt  # type: ignore[attr-defined]
    assert cli.main(TRAIN) == 130
    assert capsys.readouterr().err.endswith("cosa-fast train: interrupted; run the same command to continue\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.iterations", "0"], "error: flags: train.iterations = 0: Input should be greater than 0"),
        (["--threads", "0"], "error: flags: threads = 0: Input should be greater than 0"),
        (
            ["--train.c2s-start", "9", "--train.guidance-start", "5"],
            "guidance_start (5) must not be before c2s_start (9)",
        ),
        (["--cosa.scales"], "Tuple should have at least 1 item"),
    ],
)
def test_values_out_of_range(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, *flags]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert "run cosa-fast train --help" in text
    assert not re.search("pydantic|Traceback|tyro", text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAIN, "--train.iters", "5"], "Perhaps you meant"),
        ([*TRAIN, "--cosa.guidance", "mask"], "invalid choice 'mask'"),
        ([*TRAIN, "--config"], "Missing value for argument '--config'"),
        (["train"], "--index PATH"),
    ],
)
def test_bad_flags(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert message in capsys.readouterr().err


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("trian: {}\n")
    assert cli.main([*TRAIN, "--config", str(bad)]) == 1
    assert f"cosa-fast train: error: {bad}: unknown key 'trian'" in capsys.readouterr().err
    assert cli.main([*TRAIN, "--config", str(tmp_path / "none.yaml")]) == 1
    assert "cannot read the configuration file" in capsys.readouterr().err


def test_waiting_threads_do_not_spin() -> None:
    code = (
        "import os, sys, types\nfrom cosa_fast.cli import main\n"
        "module = types.ModuleType('cosa_fast.training.single_stage')\n"
        "module.train = lambda *a, **k: print(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'])\n"
        "sys.modules[module.__name__] = module\n"
        f"main({[*TRAIN, '--threads', '3']!r})"
    )
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["PASSIVE", "3"]
    environment["OMP_WAIT_POLICY"] = "ACTIVE"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["ACTIVE", "3"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_process_of_torchrun_ends_with_it_even_by_kill_9() -> None:
    child = "import time; from cosa_fast import cli; cli.end_with_parent(); print('ready', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        process.kill()
        process.stdout.read()  # until nobody holds its other end
        assert time.monotonic() - began < 30


def test_torchrun_learns_why_a_process_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    words = ["--index", str(tmp_path / "none.json"), "--output", str(tmp_path / "o"), "--cache", str(tmp_path / "c")]
    assert cli.main(["data", "masks", *words]) == 1
    text = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert text.startswith("cosa-fast data masks: error: ")
    assert "none.json" in text


@pytest.mark.parametrize(("error", "waits"), [(ValueError("broken"), []), (OthersGone("gone"), [3])])
def test_what_follows_from_the_error_of_another_process_is_told_late(
    error: ValueError, waits: list[int], stage_code: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchrun ends this process in between; of errors within one second it may report the wrong one as the cause."""
    waited: list[int] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)

    def train(*_: object, **__: object) -> None:
        raise error

    stage_code.train = train  # type: ignore[attr-defined]
    assert cli.main(TRAIN) == 1
    assert waited == waits
