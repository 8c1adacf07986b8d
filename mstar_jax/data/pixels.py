"""Pixels of rows: decoded, cut into crops and stacked, in this process or in one of its own.

This module and what it needs import no jax, no transformers and nothing else that is slow to start, so that a
process that runs `serve` is ready within a fraction of a second. See `workers`.
"""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mstar_jax.data.images import load_image

Size = tuple[int, int]  # (width, height)


class Job(NamedTuple):
    """Rows whose pixels are wanted.

    Attributes:
      cut: see `structs.Processor`.
      images: the paths of each row's images.
      planned: the crops that each row was planned with.
      crops: every row is padded to so many.
      size: empty rows are added up to so many.
    """

    cut: Callable[[Sequence[Image.Image]], Any]
    images: Sequence[Sequence[str]]
    planned: Sequence[int]
    crops: int
    size: int


class Found(NamedTuple):
    """What a job's images hold.

    Attributes:
      sizes: the (width, height) of each row's images, as they are shown.
      counts: how many crops each row has.
      pixels: as `cut` returns them, each array with [size, crops] in front and zeros where a row has fewer;
        None if a count is not the planned one.
    """

    sizes: list[list[Size]]
    counts: list[int]
    pixels: Any


def find(job: Job) -> Found:
    """Decodes and cuts the images of rows.

    Raises:
      ImageError: one cannot be used.
    """
    sizes, parts = [], []
    for paths in job.images:
        images = [load_image(path) for path in paths]
        sizes.append([image.size for image in images])
        parts.append(job.cut(images))
    counts = [len(part[0]) for part in parts]
    if counts != list(job.planned):
        return Found(sizes, counts, None)
    return Found(sizes, counts, type(parts[0])(*(_stacked(arrays, job) for arrays in zip(*parts))))


def _stacked(arrays: Sequence[np.ndarray], job: Job) -> np.ndarray:
    """Arrays [C, ...] of rows as one [size, crops, ...]; where other dimensions differ, the greatest."""
    shape = np.max([x.shape[1:] for x in arrays], axis=0).astype(int)
    out = np.zeros((job.size, job.crops, *shape), arrays[0].dtype)
    for row, x in enumerate(arrays):
        out[row][tuple(map(slice, x.shape))] = x
    return out


# ------------------------------------------------------------------------- between processes
# A job goes out as one message. What comes back is a message, an exception or a `Found` with a shape and
# dtype in place of each array, and then the arrays' bytes, which are neither pickled nor copied on the way.
def send(found: Found, connection: Connection, stream: socket.socket) -> None:
    """Sends a job's result."""
    arrays = () if found.pixels is None else found.pixels
    described = found.pixels and type(found.pixels)(*((x.shape, x.dtype.str) for x in arrays))
    connection.send(found._replace(pixels=described))
    for x in arrays:
        stream.sendall(_bytes(x))


def _bytes(x: np.ndarray) -> memoryview:
    return memoryview(x.reshape(-1).view(np.uint8).data)  # in place: x is contiguous


def receive(connection: Connection, stream: socket.socket) -> Found | Exception:
    """Receives a job's result, or what the job raised there.

    Raises:
      EOFError, OSError: the other side is gone.
    """
    found = connection.recv()
    if isinstance(found, Exception):
        return found
    arrays = []
    for shape, dtype in () if found.pixels is None else found.pixels:
        x = np.empty(shape, dtype)
        rest = _bytes(x)
        while len(rest):
            count = stream.recv_into(rest)
            if not count:
                raise EOFError
            rest = rest[count:]
        arrays.append(x)
    return found if found.pixels is None else found._replace(pixels=type(found.pixels)(*arrays))


def serve(descriptor: int) -> None:
    """Does the jobs that come through a socket, until its other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's business: it may want to end a step first
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(os.dup(descriptor))
    with socket.socket(fileno=descriptor) as stream:
        while True:
            try:
                job = connection.recv()
            except (EOFError, OSError):
                return
            found: Found | Exception
            try:
                found = find(job)
            except Exception as error:
                found = error
            try:
                if isinstance(found, Exception):
                    connection.send(found)
                else:
                    send(found, connection, stream)
            except OSError:  # the parent is gone
                return
