"""What was published about models, with its source: sizes, training tokens, hours and cost."""

import json
import pathlib

from moejax.models import zoo

TABLE = pathlib.Path(__file__).with_name("published.json")
UNDISCLOSED = "undisclosed"


def published() -> dict[str, dict]:
    """Facts by model name; the keys are explained in the file."""
    return {k: v for k, v in json.loads(TABLE.read_text()).items() if not k.startswith("_")}


def facts_of(name: str) -> dict:
    """Facts of a model, or of another name of the same config; empty if there are none."""
    files, facts = zoo.PRESETS | zoo.COUNTED_PRESETS, published()
    same = [n for n in files if files[n] == files.get(name)]
    return next((facts[n] for n in [name, *same] if n in facts), {})


def sizes_text(facts: dict) -> str:
    """'671B / 37B'; one number for a dense model; empty if nothing is known."""
    return " / ".join(dict.fromkeys(facts[k] for k in ("total", "active") if k in facts))


def known_names() -> list[str]:
    """Every model that can be compared or planned by name, closed ones included."""
    return sorted({**zoo.PRESETS, **zoo.COUNTED_PRESETS, **published()})
