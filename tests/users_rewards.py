"""Functions as users might write them, for the tests; most of them fail. They run in other processes."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import zlib

import numpy as np


class Odd:
    def __repr__(self):
        raise RuntimeError("not even shown")


def hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def fork():
    os.fork()
    return True  # both


def spew():
    for number in (1, 2):
        os.write(number, b'{"score": 1.0, "verdict": "correct"}\n' * 1000)
    print("no line of the protocol\n" * 1000, flush=True)
    return sys.stdin.read() == ""


def close():
    os.closerange(3, 256)
    return True


def deep():
    return deep()


RETURNED = {
    "True": True,
    "False": False,
    "correct": "correct",
    "wrong": "wrong",
    "unparsed": "unparsed",
    "0.5": 0.5,
    "0.49": 0.49,
    "numpy": np.float32(0.75),
    "numpy bool": np.bool_(True),
    "rounded up": np.float32(1) + np.finfo(np.float32).eps,
    "rounded down": 0.3 - (0.1 + 0.2),
    "nothing": None,
    "7": 7,
    "1.001": 1.001,
    "nan": float("nan"),
    "list": [1.0],
    "gold-unparsed": "gold-unparsed",
    "odd": Odd(),
}
DONE = {
    "raise": lambda: {}["no key"],
    "exit": sys.exit,
    "interrupt": lambda: signal.raise_signal(signal.SIGUSR1),
    "end": lambda: os._exit(0),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "memory": lambda: bytearray(1 << 40),
    "hang": hang,
    "fork": fork,
    "spew": spew,
    "close": close,
    "deep": deep,
    "jax": lambda: not {"jax", "mstar_jax"} & sys.modules.keys(),
}


def any_of(query, text):
    """What the text says."""
    return RETURNED[text] if text in RETURNED else DONE[text]()


def asked(query, text):
    """Right if the query is the one that the test asks with."""
    shown = (query.id, query.images, query.question, query.options, query.answer, query.answer_type)
    rest = (query.asked_type, query.source, query.precision)
    return (*shown, *rest) == ("q", ("/a.png",), "1 + 1?", ("1", "2"), "B", "choice", "choice", "s", None)


def leave_a_program(query, text):
    """Starts a program, notes its number in the file that the text names, and hangs."""
    program = subprocess.Popen(["sleep", "600"])
    pathlib.Path(text).write_text(str(program.pid))
    hang()


def coin(query, text):
    """Right for about half of all texts."""
    return zlib.crc32(text.encode()) % 2 == 0


def on_alarm(number, frame):
    raise TimeoutError


def own_limit(query, text):
    """Half of the score for what takes too long, by a limit of its own; see the handler below."""
    signal.setitimer(signal.ITIMER_REAL, float(text))
    try:
        time.sleep(60)
    except TimeoutError:
        return 0.5


def leave_a_thread(query, text):
    """Starts a thread that does not end with the process."""
    threading.Thread(target=time.sleep, args=(600,)).start()
    return True


def keep(query, text):
    """Keeps 300 MiB of every call; none of it is ever touched."""
    KEPT.append(bytes(300 << 20))
    return True


def one_argument(query):
    return True


KEPT: list[bytes] = []
NO_FUNCTION = 1
signal.signal(signal.SIGALRM, on_alarm)
