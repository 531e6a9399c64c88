"""Tests marked ``gpu`` run where the GPU path works; nothing else is skipped for want of a machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from anyattn import launch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := launch.available()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """For tests that change what a plan depends on."""
    launch.forget_plans()
    yield
    launch.forget_plans()
