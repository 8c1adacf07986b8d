"""Algebra in worker processes: what is equal, and that no formula hurts the process that asks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import sympy

from mstar_jax.answers import symbolic
from mstar_jax.answers.formulas import FUNCTIONS, Formula, parse
from mstar_jax.answers.symbolic import Pool, Worker, equal
from mstar_jax.answers.worker import OPERATIONS, build


def number(value):
    return ("number", value, 1)


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


def test_parse():
    assert parse("5*sqrt(3)") == Formula(("*", number(5), ("sqrt", number(3))))
    assert parse("y=2x") == Formula(("symbol", "y"), "=", ("*", number(2), ("symbol", "x")))
    assert parse("2≥x") == parse("2>=x") == parse(r"2\ge x") == Formula(number(2), ">=", ("symbol", "x"))
    assert parse("-2.50") == Formula(("negative", ("number", 5, 2)))
    assert parse(r"\sin^2 x_1") == Formula(("^", ("sin", ("symbol", "x_1")), number(2)))
    assert parse(r"\log_2 8") == Formula(("log", number(8), number(2)))
    assert parse("e^x") == Formula(("^", ("e",), ("symbol", "x")))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x+",
        "2 3",
        "x2",
        "((x)",
        "x)",
        "1/2/3",
        "1/2x",
        "2^2^2",
        "(2!)!",
        "21!",
        "2.5!",
        "x^{100}",
        "a.b",
        "x;y",
    ]
    + ["9**9**9", "9^{9^9}", "(((x^2)^2)^2)^2", "x^{5!}", "AB", r"\sin^{-1}x", "√√x", "x_123", "1<x<2"]
    + ["x" * 201, "(" * 150 + "x" + ")" * 50, "x+" * 80 + "x", "__import__('os')", "exec(1)", r"\input{a}"],
)
def test_what_is_open_or_too_large_is_no_formula(text):
    assert parse(text) is None


def test_build_gives_what_the_operations_mean():
    x, two, four = ["symbol", "x"], ["number", 2, 1], ["number", 4, 1]
    for tree, value in [
        (["number", 6, 4], sympy.Rational(3, 2)),
        (["log", ["number", 100, 1]], 2),
        (["log", four, two], 2),
        (["ln", ["e"]], 1),
        (["abs", ["negative", two]], 2),
        (["arcsin", ["number", 1, 1]], sympy.pi / 2),
        (["symbol", "I"], sympy.Symbol("I")),
        (["-", ["/", x, two], ["factorial", four]], sympy.Symbol("x") / 2 - 24),
    ]:
        assert build(tree) == value
    assert set(FUNCTIONS) - {"exp"} <= OPERATIONS.keys()


@pytest.mark.parametrize(
    "tree",
    [
        ["/", ["number", 1, 1], ["number", 0, 1]],
        ["ln", ["number", 0, 1]],
        ["infinity"],
        [
            "^",
            ["number", 9, 1],
            ["*", ["number", 99, 1], ["number", 99, 1]],
        ],  # the exponent is too large
        ["^", ["^", ["number", 9, 1], ["number", 990, 1]], ["number", 990, 1]],  # the value is
        ["^", ["symbol", "x"], ["number", 1001, 1]],
        ["sympy.oo"],
        ["__class__", ["number", 1, 1]],
        ["+", ["number", 1, 1]],
        [],
        "1",
    ],
)
def test_what_is_not_finite_or_no_tree_is_not_built(tree):
    with pytest.raises((ValueError, KeyError, TypeError)):
        build(tree)


def request(a, b):
    return json.dumps([parse(a), parse(b)])


HOSTILE = request("(x+y+z)^{99}", "(z+y+x)^{98} (x-y)")
DOUBLE = request("x+x", "2x")


def test_late_is_not_equal_and_the_worker_lives_on():
    pool = Pool()
    start = time.perf_counter()
    pool.ask(symbolic.FIRST)
    started = time.perf_counter()
    assert pool.ask(HOSTILE) is None
    assert time.perf_counter() - started < symbolic.PATIENCE + 1 and started - start < symbolic.START
    assert pool.ask(DOUBLE) is True
    pool.close()


def test_a_worker_that_hangs_is_killed_and_replaced(monkeypatch):
    monkeypatch.setattr(symbolic, "SECONDS", 1000.0)  # the worker's own limit is off
    pool = Pool()
    pool.ask(symbolic.FIRST)
    (worker,) = pool.workers
    assert pool.ask(HOSTILE) is None
    assert worker.process.returncode == -signal.SIGKILL and not pool.workers
    assert pool.ask(DOUBLE) is True
    pool.close()


def test_memory_is_limited():
    code = (
        "from mstar_jax.answers import worker\n"
        "compare = worker.compare\n"
        "hog = lambda a, b: bytearray(2 << 30) and True if a == ['hog'] else compare(a, b)\n"
        "worker.compare = hog\n"
        f"worker.main(60.0, {symbolic.MEMORY})\n"
    )
    asked = f'[["hog"], ["1"]]\n{DOUBLE}\n'
    run = subprocess.run(
        [sys.executable, "-c", code], input=asked, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.split() == ["null", "true"]


def test_a_worker_imports_sympy_and_nothing_of_jax():
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({symbolic.WORKER!r})\n"
        "assert 'sympy' in sys.modules\n"
        "assert not {'jax', 'numpy', 'mstar_jax', 'math_verify', 'antlr4'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_a_worker_has_the_limit():
    assert equal("2x+x", "3x")
    (worker,) = list(symbolic._pool.workers)[:1]
    with open(f"/proc/{worker.process.pid}/limits") as file:
        assert str(symbolic.MEMORY) in next(line for line in file if line.startswith("Max address space"))


def test_a_crash_is_survived():
    pool = Pool()
    assert pool.ask(DOUBLE) is True
    for worker in list(pool.workers):
        os.kill(worker.process.pid, signal.SIGKILL)
    assert pool.ask(DOUBLE) is True
    pool.close()


def test_garbage_is_no_answer():
    pool = Pool()
    one = '["number", 1, 1]'
    for garbage in (
        "x",
        '"x"',
        "[]",
        "null",
        f"[[{one}]]",
        f'[[{one}, "", null], [{one}, "<", ["number", 2, 1]]]',
        f'[[{one}, "?", {one}], [{one}, "?", {one}]]',
        '[["1", "", null], ["1", "", null]]',
        f'[[["number", "1+1"], "", null], [{one}, "", null]]',
    ):
        assert pool.ask(garbage) in (None, False)
    assert pool.ask(DOUBLE) is True
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


def test_a_worker_that_does_not_start_is_said_once(monkeypatch):
    monkeypatch.setattr(symbolic, "WORKER", "/nowhere.py")
    pool = Pool()
    with pytest.warns(UserWarning, match="compared as text only"):
        assert pool.ask(DOUBLE) is None
    assert pool.ask(DOUBLE) is None
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
        "import os\nfrom mstar_jax.answers import symbolic as s\n"
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
        worker.ask(DOUBLE, 0.001)
    assert worker.process.returncode is not None
