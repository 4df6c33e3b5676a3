"""Make the packaged demo data: four intents of BIG-bench's intent_recognition (Apache-2.0).

    python scripts/make_demo_data.py path/to/intents src/ia2/data/intents

The source folder holds train.jsonl and test.jsonl with the fields text and label. Rows of other intents
are left out; the rest is copied in order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

INTENTS = ("book_restaurant", "get_weather", "play_music", "rate_book")


def main(source: Path, target: Path) -> None:
    """Copy the rows of the four intents."""
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["label"] in INTENTS]
        (target / f"{split}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
        print(f"{split}: {len(kept)} of {len(lines)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
