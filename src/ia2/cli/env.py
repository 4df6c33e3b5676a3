"""``ia2 env``."""

from __future__ import annotations

from ia2.cli.options import Json


def env(json: Json = False) -> None:
    """Versions, machine and caches: what to paste into a bug report."""
    from ia2.cli.output import print_json, start
    from ia2.files import cache_dir
    from ia2.gguf import installed_demo_models
    from ia2.runs import machine, versions

    start(True)
    found = {
        "versions": versions(),
        "machine": machine(),
        "cache": str(cache_dir()),
        "demo_models": installed_demo_models(),
    }
    if json:
        print_json(found)
        return
    for section, values in found.items():
        print(f"{section}:")
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            print(f"  {name + ': ' if name else ''}{value}")
