"""Algebra in worker processes: what is equal, and that no formula hurts the process that asks."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mstar_jax.answers import symbolic
from mstar_jax.answers.formulas import latex
from mstar_jax.answers.symbolic import Pool, Worker, equal

EQUAL = [
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{\sqrt{2}}{2}", "1/√2"),
    (r"\frac{\sqrt{2}}{2}", r"1/\sqrt 2"),
    ("5*sqrt(3)", r"5\sqrt{3}"),
    ("√12", "2√3"),
    ("y = 2x + 1", "2x - y = -1"),
    ("y = 2x + 1", "1 + 2x"),
    ("x > 3", "3 < x"),
    ("-2x ≤ 6", "x ≥ -3"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\tan(\frac{\pi}{4})x", "x"),
    (r"\ln(e^2)", "2"),
    ("e^{x+y}", "e^x e^y"),
    ("|x-1|", "|1-x|"),
    ("1 1/2 x", "3x/2"),
    ("0.5x", "x/2"),
    ("5!x", "120x"),
    (r"\frac12x", "x/2"),
    ("α+β", "β+α"),
    ("x_1+x_2", "x_2+x_1"),
    ("d/2", "0.5d"),
]
DIFFERENT = [
    ("25π", "25"),
    ("2 3", "5"),
    ("1/2x", "x/2"),
    ("3:4", "3/4"),
    ("A + 1", "a + 1"),
    ("AB", "BA"),
    ("x = 5", "2x = 10"),
    ("x = 5", "y = 5"),
    ("x > 3", "x < 3"),
    ("-2x ≤ 6", "x ≤ -3"),
    (r"\sqrt{x^2}", "x"),
    ("√2x", "√(2x)"),
    ("sin(30)", "1/2"),
    ("1/0", "2/0"),
    ("∞", "∞ + 1"),
    ("9^9^9", "9^9^9"),
    ("100!", "100!"),
    ("x^{1000000}", "x^{1000000}"),
    ("1/2/2003", "2/4/2003"),
    ("3 and 5", "5"),
    ("cats + dogs", "dogs + cats"),
    ("π/3", "1.0471975511965976"),
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal(a, b):
    assert equal(a, b) and equal(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert not equal(a, b) and not equal(b, a)


def test_latex_leaves_nothing_open():
    assert latex("5*sqrt(3)") == (r"5 \cdot \sqrt{(3)}",)
    assert latex("y=2x") == ("(y)", "=", r"2 \cdot (x)")
    for text in (
        "",
        "x+",
        "2 3",
        "x2",
        "((x)",
        "x)",
        "1/2/3",
        "2^2^2",
        "(2!)!",
        "21!",
        "x^{100}",
        "a.b",
        "x;y",
    ):
        assert latex(text) is None
    for text in (
        "x" * 201,
        "(" * 150 + "x" + ")" * 50,
        "x+" * 80 + "x",
        "__import__('os')",
        "exec(1)",
        "\\input{a}",
    ):
        assert latex(text) is None


def test_late_is_not_equal_and_the_worker_goes_on():
    pool = Pool()
    hostile = ["((x)+(y)+(z))^{99}"]
    start = time.perf_counter()
    pool.ask([["1"], ["2"]])
    started = time.perf_counter()
    assert pool.ask([hostile, ["((z)+(y)+(x))^{98} \\cdot ((x)-(y))"]]) is None
    assert time.perf_counter() - started < symbolic.PATIENCE + 1 and started - start < symbolic.START
    assert pool.ask([["(x)+(x)"], ["2 \\cdot (x)"]]) is True
    pool.close()


def test_a_worker_that_hangs_is_killed_and_replaced(monkeypatch):
    monkeypatch.setattr(symbolic, "SECONDS", 1000.0)  # the worker's own limit is off
    pool = Pool()
    pool.ask([["1"], ["2"]])
    (worker,) = pool.workers
    assert pool.ask([["((x)+(y)+(z))^{99}"], ["((z)+(y)+(x))^{98} \\cdot ((x)-(y))"]]) is None
    assert worker.process.returncode == -signal.SIGKILL and not pool.workers
    assert pool.ask([["(x)+(x)"], ["2 \\cdot (x)"]]) is True
    pool.close()


def test_memory_is_limited():
    code = (
        "from mstar_jax import algebra\n"
        "compare = algebra.compare\n"
        "hog = lambda a, b: bytearray(2 << 30) and True if a == ['hog'] else compare(a, b)\n"
        "algebra.compare = hog\n"
        f"algebra.main(60.0, {symbolic.MEMORY})\n"
    )
    asked = '[["hog"], ["1"]]\n[["(x)+(x)"], ["2 \\\\cdot (x)"]]\n'
    run = subprocess.run(
        [sys.executable, "-c", code], input=asked, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.split() == ["null", "true"]


def test_a_worker_has_the_limit():
    assert equal("2x+x", "3x")
    (worker,) = list(symbolic._pool.workers)[:1]
    with open(f"/proc/{worker.process.pid}/limits") as file:
        assert str(symbolic.MEMORY) in next(line for line in file if line.startswith("Max address space"))


def test_a_crash_is_survived():
    pool = Pool()
    assert pool.ask([["1"], ["1"]]) is True
    for worker in list(pool.workers):
        os.kill(worker.process.pid, signal.SIGKILL)
    assert pool.ask([["(x)+(x)"], ["2 \\cdot (x)"]]) is True
    pool.close()


def test_garbage_is_no_answer():
    pool = Pool()
    for request in ("x", [], [["1"]], [["\\frac{"], ["1"]], [["1"], ["1", "<", "2"]], [[1], [2]], None):
        assert pool.ask(request) in (None, False)
    pool.close()


def test_any_thread_may_ask():
    found = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(equal(f"x^2+{i}x+x", f"x(x+{i}+1)")))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_a_missing_parser_is_said_once(monkeypatch):
    monkeypatch.setattr(symbolic, "WORKER", "/nowhere.py")
    pool = Pool()
    with pytest.warns(UserWarning, match="compared as text only"):
        assert pool.ask([["1"], ["1"]]) is None
    assert pool.ask([["1"], ["1"]]) is None
    pool.close()


def test_workers_start_late_and_end_with_their_parent():
    code = (
        "import mstar_jax.answers.check as a, mstar_jax.answers.symbolic as s\n"
        "assert a.grade('The answer is 4', '4').verdict == 'correct' and not s._pool.workers\n"
        "assert a.grade('The answer is 2x+x', '3x').verdict == 'correct'\n"
        "print(*[w.process.pid for w in s._pool.workers], flush=True)\n"
    )
    start = time.perf_counter()
    for ending in (
        "",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n",
        "import os; os._exit(1)\n",
    ):
        run = subprocess.run(
            [sys.executable, "-c", code + ending], capture_output=True, text=True, timeout=120
        )
        pid = int(run.stdout)
        for _ in range(100):
            if not os.path.exists(f"/proc/{pid}"):
                break
            time.sleep(0.1)
        assert not os.path.exists(f"/proc/{pid}")
    assert time.perf_counter() - start < 120


def test_a_fork_has_its_own_workers():
    code = (
        "import os\nfrom mstar_jax import symbolic as s\n"
        "assert s.equal('2x+x', '3x')\n"
        "if not (child := os.fork()):\n"
        "    os._exit(0 if not s._pool.workers and s.equal('4x+x', '5x') else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert s.equal('6x+x', '7x')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_worker_dies_of_nothing_said():
    worker = Worker()
    with pytest.raises(TimeoutError):
        worker.ask([["1"], ["1"]], 0.001)
    assert worker.process.returncode is not None
