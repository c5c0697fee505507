"""Opens changed files one after the other, and says of each how that went: "DOOR NUMBER ok", "DOOR NUMBER refused
SENTENCE" or "DOOR NUMBER wrong REASON". Started as `worker.py FOLDER LAST DOOR:FIRST …`; its parent sees where it died.

While a door is open nothing may be started, connected to or written; memory is bounded, and so is time.
"""

import os
import random
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch

torch.set_num_threads(1)

from doors import DOORS  # noqa: E402

from kvist.cli.errors import EXIT, sentence  # noqa: E402

ROOM = 3 << 30  # bytes of address space beyond what a genuine file takes
SECONDS = 20  # of the processor: a hostile file is refused in milliseconds, a genuine one takes some dozens
STARTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.", "socket.")
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.")
armed, seen = False, []


def watch(event: str, args: tuple) -> None:
    """Note what no door may do."""
    if not armed:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    own = any("__pycache__" in str(arg) for arg in args[:2])  # of numba, which keeps what it compiled
    if event.startswith((*STARTS, *WRITES)) or writes:
        seen.extend([] if own or str(args[0]) == os.devnull else [f"{event} {args!r:.200}"])


def late(*_) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def outcome(use, path: Path) -> str:
    """One changed file, opened and used."""
    global armed
    seen.clear()
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    armed = True
    try:
        use(path)
        found = "ok"
    except TimeoutError as error:
        found = f"wrong {error}"
    except Exception as error:
        said = sentence(error)
        if said is None or said[1] != EXIT or len(said[0]) > 1500:
            armed = False
            found = "wrong " + " | ".join(traceback.format_exception(error)[-4:]).replace("\n", " ")
        else:
            found = "refused " + said[0].replace("\n", " ")
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return f"wrong it did {seen[0]}" if seen else found


def main(folder: Path, last: int, firsts: dict[str, int]) -> None:
    warnings.simplefilter("ignore")  # of numbers that overflow: what counts is what comes out
    changed = folder / "changed"
    changed.mkdir(exist_ok=True)
    for name in firsts:
        DOORS[name].use(folder / "genuine" / name)  # compiles what there is to compile
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    signal.signal(signal.SIGVTALRM, late)
    sys.addaudithook(watch)
    for name, first in firsts.items():
        for number in range(first, last):
            DOORS[name].change(folder / "genuine" / name, changed / name, random.Random(f"{name} {number}"))
            print(name, number, ascii(outcome(DOORS[name].use, changed / name))[1:-1], flush=True)


if __name__ == "__main__":
    starts = (word.rsplit(":", 1) for word in sys.argv[3:])
    main(Path(sys.argv[1]), int(sys.argv[2]), {name: int(first) for name, first in starts})
