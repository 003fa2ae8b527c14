"""A model that goes on from the tokens that it had last, wherever its blocks are."""

from __future__ import annotations

from .device_generator import DeviceGenerator
from .split import SplitModel

GeneratingModel = SplitModel | DeviceGenerator
