"""Loads the plugin, from the installed package or from this checkout."""

pytest_plugins = ["fp4bench.plugin"]
