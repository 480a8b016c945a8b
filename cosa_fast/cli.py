"""The command line `cosa-fast <stage>`: settings as flags, progress as log lines, bad input as one line."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import inspect
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from cosa_fast import __version__
from cosa_fast.config import Config, Section, config_from_mapping, load_config
from cosa_fast.stages import STAGES, Stage

logger = logging.getLogger("cosa_fast")
registry = ConstructorRegistry()
SECTION_NAMES = {field.annotation: name for name, field in Config.model_fields.items()}
# torchrun's variables; `cosa_fast.distributed` reads them too, but imports torch.
PROCESSES, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))


class BadFlag(Exception):
    """A flag whose value the configuration refuses (not a ValueError, which tyro would wrap in its own words)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; the exit code is 0, 1 (bad input), 2 (bad flags) or 130 (interrupted)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen = next((stage for stage in STAGES if words[: len(stage.command.split())] == stage.command.split()), None)
    if chosen is None:
        return _top_level(words)
    name = f"cosa-fast {chosen.command}"
    _configure_logging(None)
    try:
        stage = _parse(chosen, words[len(chosen.command.split()) :])
        if PROCESSES > 1 and not stage.parallel:
            raise ValueError(f"torchrun started {PROCESSES} processes, but this stage runs in one: start it without")
        _configure_logging(stage.log)
        if PROCESSES > 1:
            end_with_parent()
        # A waiting OpenMP thread must not spin on a core that another process could use; torch reads these on import.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("OMP_NUM_THREADS", str(stage.threads))
        started = time.perf_counter()
        processes = f"{PROCESSES} processes with " if PROCESSES > 1 else ""
        logger.info("%s: started (cosa-fast %s, %sthreads %d)", chosen.command, __version__, processes, stage.threads)
        stage.run()
        if PROCESSES > 1 and "cosa_fast.distributed" in sys.modules:
            # Not after an error: the others wait for this process, which has to end for torchrun to end them.
            sys.modules["cosa_fast.distributed"].leave()
        logger.info("%s: finished in %s, %s", chosen.command, _duration(time.perf_counter() - started), _peak_memory())
    except BadFlag as error:
        _let_the_cause_speak(error)
        _tell_torchrun(f"{name}: error: {error}")
        logger.error("%s: error: %s\nFor full helptext, run %s --help", name, error, name)
        return 2
    except (ValueError, OSError) as error:
        _let_the_cause_speak(error)
        _tell_torchrun(f"{name}: error: {error}")
        logger.error("%s: error: %s", name, error, exc_info=os.environ.get("COSA_FAST_DEBUG") == "1")
        return 1
    except KeyboardInterrupt:
        logger.error("\n%s: interrupted; run the same command to continue", name)
        return 130
    except Exception:
        logger.exception("%s: failed unexpectedly; please report this", name)
        return 1
    return 0


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends, as by kill -9 (Linux; elsewhere nothing).

    A process of a killed torchrun would go on training, and the same command could not continue.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _let_the_cause_speak(error: Exception) -> None:
    """Mostly the first process has the same error to tell; then torchrun ends this one before it repeats it.

    So with an error that only follows from another process's, which torchrun could else report as the root cause: it
    tells apart what happened in different seconds.
    """
    distributed = sys.modules.get("cosa_fast.distributed")
    if RANK > 0 or (distributed is not None and isinstance(error, distributed.OthersGone)):
        time.sleep(3)


def _tell_torchrun(text: str) -> None:
    """Torchrun closes with a report of its own, which shows as the root cause what stands in this file."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        about = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": about}))


def _top_level(words: list[str]) -> int:
    """Answer a command line that names no stage."""
    if words == ["--version"]:
        print(f"cosa-fast {__version__}")
        return 0
    known = [(stage.command, (stage.__doc__ or "").partition("\n")[0]) for stage in STAGES]
    width = max(len(command) for command, _ in known)
    helptext = "\n".join(
        [
            "usage: cosa-fast [--version] STAGE [--help] [flags]",
            "",
            "Weakly supervised semantic segmentation from image tags: CoSA, stage by stage. `snakemake` runs them all.",
            "",
            "stages, in order:",
            *(f"  {command:<{width}}  {summary}" for command, summary in known),
        ]
    )
    if {"-h", "--help"} & set(words):
        print(helptext)
        return 0
    wrong = [f"cosa-fast: error: {' '.join(words[:2])!r} is not a stage"] if words else []
    print("\n".join([*wrong, helptext]), file=sys.stderr)
    return 2


def _parse(stage: type[Stage], words: list[str]) -> Stage:
    """Flags over `--config` files over the defaults."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", nargs="?", type=Path, action="append", default=[])
    paths = [path for path in files.parse_known_args(words)[0].config if path is not None]
    config = load_config(*paths)
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(stage):
        if field.name in Config.model_fields:
            defaults[field.name] = getattr(config, field.name)
        elif field.default is dataclasses.MISSING:
            defaults[field.name] = tyro.MISSING
    parsed = tyro.cli(
        stage,
        prog=f"cosa-fast {stage.command}",
        description=inspect.getdoc(stage),
        args=words,
        default=stage(**defaults),
        config=(tyro.conf.FlagConversionOff,),
        registry=registry,
    )
    if parsed.threads < 1:
        raise BadFlag(f"flags: threads = {parsed.threads}: Input should be greater than 0")
    return parsed


@registry.struct_rule
def _section_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Sections of the configuration: flags from their fields, one validation for flags and files."""
    if not (isinstance(info.type, type) and issubclass(info.type, Section)):
        return None
    name, default = SECTION_NAMES[info.type], info.default

    def instantiate(**values: Any) -> Section:
        try:
            section: Section = getattr(config_from_mapping({name: values}, source="flags"), name)
        except ValueError as error:
            raise BadFlag(error) from None
        return section

    return StructConstructorSpec(
        instantiate=instantiate,
        fields=tuple(
            StructFieldSpec(
                name=key,
                type=Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation,  # type: ignore[arg-type]
                default=getattr(default, key),
                helptext=field.description,
            )
            for key, field in info.type.model_fields.items()
        ),
    )


def _configure_logging(path: Path | None) -> None:
    """INFO of this package, WARNING of others, to stderr (above the progress bars) and to `path`.

    Of several processes the first one reports; the others only warn, on stderr.
    """
    handlers: list[logging.Handler] = [_AboveProgressBars()]
    if path is not None and RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path, mode="w"))
    for handler in handlers:
        handler.setFormatter(_Lines("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=handlers, force=True)
    logger.setLevel(logging.INFO if RANK == 0 else logging.WARNING)


class _AboveProgressBars(logging.Handler):
    """Writes to stderr without tearing a tqdm bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


class _Lines(logging.Formatter):
    """The time before each line, except before errors."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return record.message if record.levelno >= logging.ERROR else super().formatMessage(record)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"


def _peak_memory() -> str:
    """Peak resident memory of this process, and of the GPU if one was used."""
    text = f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        text += f", GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    return text


if __name__ == "__main__":
    sys.exit(main())
