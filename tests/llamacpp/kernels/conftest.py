"""Two processes: one in which ggml has the kernels, and one in which it computes alone."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from appliance.llamacpp.kernels.library import KernelsUnavailable, build_library, check_processor
from tests.llamacpp.kernels import graphs

Run = Callable[..., Any]
"""Runs a function with its arguments in the other process."""


@contextmanager
def process(*, plain: bool) -> Iterator[Run]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=graphs.begin, initargs=(plain,)) as pool:
        yield lambda function, *arguments, **more: pool.submit(function, *arguments, **more).result()


@pytest.fixture(scope="session")
def built() -> None:
    """The library, as set-up makes it."""
    try:
        check_processor()
        build_library()
    except KernelsUnavailable as error:
        pytest.skip(f"no kernels here: {error}")


@pytest.fixture(scope="module")
def kernels(built: None) -> Iterator[Run]:
    with process(plain=False) as run:
        installed = run(graphs.kernels)
        assert installed.names, installed.reason
        yield run


@pytest.fixture(scope="module")
def plain(built: None) -> Iterator[Run]:
    with process(plain=True) as run:
        yield run
