"""The command line: the one place that parses arguments. Wrong input ends in a sentence and exit status 2."""

import difflib
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence

from s4audio import __version__

HELP = """s4audio trains models of raw audio on a folder of recordings, and makes sound with them.

  s4audio demo                                see and hear it all: trains a small model on the clips that come with it
  s4audio check FOLDER                        what training will make of a folder: what it uses, and why not the rest
  s4audio train FOLDER                        a model of your recordings, with sounds, scores and a page, in one command
  s4audio fit --config RECIPE.yaml            train what a recipe says; the same command goes on where it stopped
  s4audio generate MODEL --from noise         make audio from noise, or from a recording with --from FILE
  s4audio models                              the pretrained models of this installation, for MODEL by their names
  s4audio reconstruct MODEL IN.wav OUT.wav    send a recording of any length through a model, block by block
  s4audio stream MODEL                        raw samples from standard input through a model to standard output, live
  s4audio evaluate GENERATED REFERENCE        how close generated audio comes to recordings, and how sure that is
  s4audio info MODEL                          what a model is, how it was trained, and what it remembers for how long
  s4audio doctor                              check this installation, and say what is missing

A MODEL is a folder that training wrote, such as runs/NAME/best, or a name that `s4audio models` lists. `s4audio VERB
--help` tells more about each.

First steps: `s4audio demo`; then, with recordings of your own,
  s4audio check FOLDER
  s4audio train FOLDER --minutes 10"""

# Each is the function of that name in a module of that name, which is imported when it is called: help comes at once.
VERBS = ("demo", "check", "train", "fit", "generate", "models", "reconstruct", "stream", "evaluate", "info", "doctor")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status: 0, 2 for wrong input, 1 for what went wrong on the way."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):  # a name that the terminal cannot show must not end a run
            file.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    verb = arguments[0]
    if verb == "--version":
        print(f"s4audio {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {near[0]}?" if near else "`s4audio --help` explains them."
        return _fail(f"{verb!r} is not a verb; there are {', '.join(VERBS)}: {hint}")
    try:
        return getattr(importlib.import_module(f"s4audio.cli.{verb}"), verb)(arguments[1:]) or 0
    except ValueError as error:  # AudioError and CheckpointError are ValueErrors
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("stopped; no file is half-written.", status=130)
    except BrokenPipeError:  # the reader of the output, `head` for one, has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, so that Python's last flush finds somewhere to go
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in NO_ROOM:
            return _fail(f"{place}the disk is full ({error.strerror}); make room, then give the command again.", status=1)
        why = "it is a file, and a folder is wanted" if isinstance(error, FileExistsError) else error.strerror
        return _fail(f"{place}{why}; choose another place." if why else str(error))
    except RuntimeError as error:
        return _fail(str(error), status=1)


def _fail(message: str, status: int = 2) -> int:
    print(f"s4audio: {' '.join(message.split())}", file=sys.stderr)
    return status
