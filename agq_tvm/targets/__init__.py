"""Devices as data: what code may use on them, and how to link for them."""

from agq_tvm.targets.device import Cluster, Device, device_names, load_device

__all__ = ["Cluster", "Device", "device_names", "load_device"]
