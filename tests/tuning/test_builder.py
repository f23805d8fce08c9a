"""Tasks travel to the processes that build as plain values."""

import json
from dataclasses import replace

import pytest

from agq_tvm.flow.tasks import extract_tasks
from agq_tvm.targets import load_device
from agq_tvm.tuning.builder import plain, task_of


@pytest.mark.parametrize("cache", ["float16", "int8"])
@pytest.mark.parametrize("device", ["x86-64-avx512vnni", "raspberry-pi-4"])
def test_a_task_is_the_same_after_json(tiny_checkpoint, device, cache):
    for task in extract_tasks(tiny_checkpoint, load_device(device), 64, cache):
        made = task_of(json.loads(json.dumps(plain(task))))
        assert made == replace(task, name="", count=made.count, macs=0, bytes=0, cold_bytes=0)
