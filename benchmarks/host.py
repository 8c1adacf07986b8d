"""The host's side at the paper's size: reading, planning and starting with 180,000 rows and 20,000 images.

    python benchmarks/host.py [--only=read,start,judging,memory] [--rows=180000] [--images=20000]
        [--folder=/scratch]

Makes a file in MathV360K's format with its images, then measures each figure in a process of its own: wall
time, processor time (user and system, of all threads; it is what counts on a busy machine), and the peak of
resident memory. Files are in the system's page cache. The data is the same at every start: a few pictures of
each kind (photos, charts, tables, geometry, rendered scenes; PNG and JPEG) with sizes as in MathV360K,
each copied many times with a comment that makes its bytes its own; and questions and answers in the
published forms, with numbers that make them different. It is written to a temporary folder, or kept in
`--folder` and used again there.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from spent import Spent, highest

ROOT = pathlib.Path(__file__).resolve().parents[1]
VOCABULARY = 4096  # ids of the tiny policy's tokenizer
WARMUP = 50_000  # queries that the paper's size of a warm-up plans before its first response


# ---- 1. data ------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Pictures of a source.

    Attributes:
      source: the first folder of their paths.
      share: of all images.
      mode: of the file, as Pillow calls it.
      width, height: pixels.
      suffix: `png` or `jpg`.
    """

    source: str
    share: float
    mode: str
    width: int
    height: int
    suffix: str


KINDS = (
    Kind("VQA2.0", 0.25, "RGB", 640, 480, "jpg"),
    Kind("TabMWP", 0.25, "RGB", 350, 220, "png"),
    Kind("PlotQA", 0.20, "RGB", 850, 600, "png"),
    Kind("GeoQA+", 0.15, "RGBA", 260, 220, "png"),
    Kind("CLEVR-Math", 0.10, "RGB", 480, 320, "png"),
    Kind("DocVQA", 0.05, "L", 1200, 1600, "jpg"),
)
HINT = "<image>\nHint: Please answer the question"
VARIANTS = 6  # pictures of a kind that are drawn


def drawn(kind: Kind, seed: int) -> bytes:
    """The file of one picture."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.source.encode())])
    width, height = kind.width + int(rng.integers(-40, 40)), kind.height + int(rng.integers(-30, 30))
    if kind.source in ("VQA2.0", "CLEVR-Math"):  # soft light and some noise
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((width, height), 3)
        noise = rng.normal(0, 2 if kind.suffix == "png" else 5, (height, width, 3))
        image = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
    else:
        image = Image.new(kind.mode, (width, height), "white" if kind.mode != "RGBA" else (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    for number in range(width * height // 6000):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        red, green, blue = (int(c) for c in rng.integers(0, 200, 3))
        colour = red if image.mode == "L" else (red, green, blue)
        draw.line((x, y, int(rng.integers(width)), y), fill=colour, width=1)
        draw.text((x, y), f"{number * 37 % 1000} cm", fill=colour)
        if number % 5 == 0:
            draw.rectangle((x, y, x + width // 12, y + height // 9), outline=colour, fill=colour)
    if kind.source == "GeoQA+":
        image = image.filter(ImageFilter.SMOOTH)
    file = io.BytesIO()
    image.save(file, "PNG" if kind.suffix == "png" else "JPEG")
    return file.getvalue()


def marked(data: bytes, text: bytes) -> bytes:
    """The same picture in a file of its own: with a comment."""
    if data.startswith(b"\xff\xd8"):
        return data[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + data[2:]
    chunk = b"tEXtComment\0" + text
    length, checksum = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    return data[:33] + length + chunk + checksum + data[33:]


def conversation(rng: np.random.Generator, kind: Kind, number: int) -> tuple[str, str]:
    """The two turns of a row, as the sources have them."""
    a, b, c = (int(n) for n in rng.integers(2, 900, 3))
    if kind.source in ("TabMWP", "GeoQA+") and number % 2:
        options = [str(n) for n in dict.fromkeys((a + b, a + b + 1, abs(a - b), a + c, b + c))][:4]
        right = int(rng.integers(len(options)))
        listed = "\n".join(f"({'ABCD'[i]}) {text}" for i, text in enumerate(options))
        asked = (
            f"As shown in the figure, in triangle ABC number {number}, the side AB is {a} cm, the angle BAC "
            f"is {b % 170} degrees and point D lies {c} cm from C on the line AB. What is the length of AD?"
        )
        human = f"{HINT} provide the correct option letter, e.g., A, B, C, D, at the end.\nQuestion: {asked}"
        return f"{human}\nChoices:\n{listed}", f"The answer is {'ABCD'[right]}"
    if kind.source in ("PlotQA", "CLEVR-Math") or number % 3 == 0:
        hint = f"{HINT} requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end."
        asked = f"Subtract {a} small cylinders and {b} red balls. How many objects of row {number} are left?"
        return f"{hint}\nQuestion: {asked}", f"{a} + {b} = {a + b}. The answer is {a + b}"
    if number % 3 == 1:
        hint = (
            f"{HINT} requiring a floating-point number with one decimal place and provide the final value, "
        )
        asked = f"What is the ratio of {a} to {b} in the year {1900 + c % 120} on page {number}?"
        return f"{hint}e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: {asked}", f"The answer is {a / b:.1f}"
    words = ("red", "a dog", "left", "two people", "Paris", "no", "yes", "snow board")
    asked = f"What stands beside object {a} in photo {number}?"
    return f"<image>\nQuestion: {asked}", f"The answer is {words[a % 8]}"


def write_data(folder: pathlib.Path, rows: int, images: int) -> pathlib.Path:
    """Writes train.json with its images, unless the folder holds them; returns its path."""
    path = folder / f"train_{rows}_{images}.json"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    paths: list[tuple[Kind, str]] = []
    for kind in KINDS:
        pictures = [drawn(kind, seed) for seed in range(VARIANTS)]
        place = folder / kind.source / "images"
        place.mkdir(parents=True, exist_ok=True)
        for number in range(max(1, round(kind.share * images))):
            data = marked(pictures[number % VARIANTS], f"{kind.source} {number}".encode())
            (place / f"{number}.{kind.suffix}").write_bytes(data)
            paths.append((kind, f"{kind.source}/images/{number}.{kind.suffix}"))
    order = rng.permutation(rows) % len(paths)
    found = []
    for number, at in enumerate(order):
        kind, image = paths[at]
        human, gpt = conversation(rng, kind, number)
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
        found.append({"id": f"{kind.source}_{number}", "image": image, "conversations": turns})
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(path)
    return path


def write_policy(folder: pathlib.Path, data: pathlib.Path) -> pathlib.Path:
    """Writes a checkpoint of configs/tiny.py's size, with a tokenizer of the questions."""
    import jax.numpy as jnp

    from configs import tiny
    from mstar_jax import configure, models
    from mstar_jax.models import phi35

    policy = folder / "policy"
    if (policy / "model.safetensors").exists():
        return policy
    values = tiny.get_config().policy
    values.vocab_size = VOCABULARY
    texts = [row["conversations"][0]["value"] for row in json.loads(data.read_text())[:5000]]
    phi35.make_tokenizer(texts, folder / "tokenizer", VOCABULARY)
    source = models.FromScratch(phi35.FAMILY, configure.policy_config(values), folder / "tokenizer")
    source.save(source.build(0), policy, jnp.dtype("float32").name)
    return policy


# ---- 2. measuring -------------------------------------------------------------------------------------


def forget() -> None:
    """Lets the peak begin again at what is resident now, where the system allows it."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def measured(what: str, into: list[Spent]) -> Iterator[None]:
    """Adds what the block costs."""
    forget()
    clock, processor = time.perf_counter(), time.process_time()
    yield
    seconds, spent = time.perf_counter() - clock, time.process_time() - processor
    into.append(Spent(what, seconds, spent, highest() / 1e9))


class Place(NamedTuple):
    """The data, the checkpoint of a tiny policy, and a folder for workdirs."""

    data: pathlib.Path
    policy: pathlib.Path
    scratch: pathlib.Path

    def flags(self) -> dict[str, str | int]:
        """What the config of a run of the paper's size changes in configs/tiny.py."""
        rows = {"evolve.fraction": 0.25, "warmup.queries": WARMUP, "data.validation": 250, "data.test": 750}
        lengths = {"data.max_prompt": 1536, "data.buckets": "(128,192,256,320,512,1024,2048)"}
        paths = {"data.labelled": str(self.data), "policy.path": str(self.policy)}
        return {**rows, **lengths, **paths, "eval.samples": 0, "eval.test_at": "()"}


def opened(place: Place, found: list[Spent], again: bool) -> None:
    """Reading rows, the splits, the digests of inputs.json, and planning, as the start of a run does it."""
    from configs import tiny
    from mstar_jax import configure, sources, workdir
    from mstar_jax.data import splits
    from mstar_jax.inference import generate

    config = tiny.get_config()
    config.data.labelled, config.policy.path = str(place.data), str(place.policy)
    config.data.validation, config.data.test, config.data.max_prompt = 250, 750, 1536
    folder = place.scratch / "opened"
    folder.mkdir(exist_ok=True)
    when = "second start" if again else "first start"
    with measured(f"{when}: rows read and split", found):
        workdir.recall_images(folder)
        data = sources.load_data(config, folder)
        workdir.keep_images(folder)
    with measured(f"{when}: digests", found):
        for name in ("labelled", "unlabelled", "validation", "test"):
            workdir.of_queries(getattr(data, name), folder)
    processor = configure.make_policy(config, folder, data.base).processor()
    host = generate.inference(config, folder, processor)
    queries = splits.shuffled(data.labelled, 0, 0)[:WARMUP]
    with measured(f"{when}: {len(queries)} prompts planned", found):
        planned = generate.plan(host, generate.ask(queries, config.prompts.hint), "warmup")
    with measured(f"{when}: the same again", found):
        generate.plan(host, generate.ask(queries, config.prompts.hint), "warmup")
    assert any(planned), "no prompt fits"


def read(place: Place) -> list[Spent]:
    """What the start of a run does on the host, in two processes: this one, and one with its caches."""
    found: list[Spent] = []
    opened(place, found, again=(place.scratch / "opened").exists())
    return found


def used(pid: int) -> float:
    """Seconds of processors that a process and its ended children have used."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def peak_of(pid: int) -> float:
    """Peak resident memory of a process, GB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 / 1e9 if found else 0.0


def start(place: Place) -> list[Spent]:
    """From the start of the main job to its first responses, of `base` and of the warm-up, and from its
    second start to the next ones; a run is stopped then. Whether programs are compiled at the second start
    depends on the environment's compilation cache."""
    found: list[Spent] = []
    work = place.scratch / "run"
    flags = [f"--config.{key}={value}" for key, value in place.flags().items()]
    command = [sys.executable, "-m", "mstar_jax.main", f"--config={ROOT}/configs/tiny.py"]
    command.append(f"--workdir={work}")
    for when, names in (("first start", ("base_validation", "warmup")), ("second start", ("warmup",))):
        there = {name: set((work / "rollouts" / name).glob("*.jsonl")) for name in names}
        clock = time.perf_counter()
        log = open(place.scratch / f"{when}.log", "w")  # noqa: SIM115 - as long as the process
        job = subprocess.Popen([*command, *flags], stdout=log, stderr=log)
        for name in names:
            while not set((work / "rollouts" / name).glob("*.jsonl")) - there[name]:
                if job.poll() is not None:
                    raise SystemExit(pathlib.Path(log.name).read_text())
                time.sleep(0.05)
            row = Spent(f"{when}: to the first responses of {name}", time.perf_counter() - clock)
            row.processor, row.peak = used(job.pid), peak_of(job.pid)
            found.append(row)
        job.send_signal(signal.SIGTERM)
        job.wait()
        log.close()
    return found


def judging(place: Place) -> list[Spent]:
    """An iteration's 720,000 responses: judged, stored, read again and selected; see host_judging.py."""
    import host_judging

    return host_judging.judging(place.scratch / "judging", host_judging.QUERIES, host_judging.SAMPLES)


def memory(place: Place) -> list[Spent]:
    """Memory over 1,000 train steps and 20 chunks of scores: after a tenth of them, and at the end."""
    import host_judging

    found: list[Spent] = []
    seen = host_judging.memory(place.scratch / "memory", host_judging.STEPS, host_judging.CHUNKS, workers=1)
    for name, gigabytes in seen.items():
        for when, at in (("after a tenth", len(gigabytes) // 10), ("at the end", -1)):
            found.append(Spent(f"memory of {len(gigabytes)} {name}, {when}", peak=gigabytes[at][0]))
    return found


FIGURES: dict[str, Callable[[Place], list[Spent]]] = {
    "read": read,
    "start": start,
    "judging": judging,
    "memory": memory,
}
TIMES = {"read": 2}  # processes that measure a figure, one after the other


# ---- 3. the command -----------------------------------------------------------------------------------


def measure(names: list[str], place: Place) -> list[Spent]:
    """The figures, each in a process of its own, on caches that begin empty."""
    found: list[Spent] = []
    for name in [name for each in names for name in [each] * TIMES.get(each, 1)]:
        command = [sys.executable, __file__, "--measure", name, *map(str, place)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: it ended with {done.returncode}\n{done.stdout}")
        found += [Spent(**row) for row in json.loads(done.stdout.splitlines()[-1])]
        for row in found[-1:]:
            print(f"{name} done: {row.what}", file=sys.stderr)
    return found


def table(found: list[Spent]) -> str:
    """The figures in Markdown."""
    lines = ["| figure | seconds | of processors | peak, GB |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.seconds:.1f} | {row.processor:.1f} | {row.peak:.2f} |" for row in found]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=180_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--folder", default="", help="keeps the data here, and uses it again")
    parser.add_argument("--only", default=",".join(FIGURES), help="figures, with commas between them")
    parser.add_argument("--out", default="", help="a JSON file for the figures")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, *paths = args.measure
        found = FIGURES[name](Place(*map(pathlib.Path, paths)))
        print(json.dumps([dataclasses.asdict(row) for row in found]))
        return
    names = args.only.split(",")
    if unknown := set(names) - set(FIGURES):
        known = ", ".join(FIGURES)
        parser.error(f"--only={args.only}: no figure is called {', '.join(unknown)}; known: {known}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(args.folder or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        data = write_data(folder, args.rows, args.images)
        found = measure(names, Place(data, write_policy(folder, data), pathlib.Path(scratch)))
    print(table(found))
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=1))


if __name__ == "__main__":
    main()
