"""What the contract tests share: one Ceph cluster for all of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.ceph import Ceph, make_bucket
from tests.conftest import short_directory

BUCKET = "hvsnap-tests"


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    path = short_directory()
    with Ceph(path) as cluster:
        make_bucket(cluster, BUCKET)
        yield cluster
    shutil.rmtree(path, ignore_errors=True)
