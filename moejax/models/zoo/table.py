"""The table of families in docs/models.md: `python -m moejax.models.zoo.table`."""

from moejax.models import zoo
from moejax.text import Table, render


def family_table() -> str:
    """Markdown: a row for each module of a family, from its first line, with the presets that it reads."""
    names: dict[str, list[str]] = {}
    for name in zoo.PRESETS:
        names.setdefault(zoo.load_hf(name)["model_type"], []).append(name)
    rows = []
    for module in dict.fromkeys(zoo.FAMILIES.values()):
        types = [t for t, m in zoo.FAMILIES.items() if m is module]
        about = (module.__doc__ or "").partition("\n")[0].rstrip(".")
        presets = [f"`{n}`" for t in types for n in names.get(t, ())]
        rows.append((", ".join(f"`{t}`" for t in types), about, ", ".join(presets)))
    return render([Table("", ("model_type", "family", "presets"), rows)], "markdown")


if __name__ == "__main__":
    print(family_table())
