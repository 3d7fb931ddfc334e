"""Loads the plugin in a checkout where fp4bench is not installed."""

from importlib.metadata import entry_points

if not any(entry.value == "fp4bench.plugin" for entry in entry_points(group="pytest11")):
    pytest_plugins = ["fp4bench.plugin"]
