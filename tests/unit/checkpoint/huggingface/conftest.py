"""What every test of folders of transformers is given."""

import os

import pytest
import torch
from hf_models import LENGTH, VOCAB


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """No power failure is tested here, and a busy disk takes a second for each file."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
