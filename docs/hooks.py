"""mkdocs: takes README.md and results/*.md into the site.

They lie outside docs/, where GitHub shows them. Links are written for GitHub; here they are turned
into those of the site.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    outside = {"index.md": ROOT / "README.md"}
    outside |= {f"results/{path.name}": path for path in sorted((ROOT / "results").glob("*.md"))}
    outside["results/claims.yaml"] = ROOT / "results" / "claims.yaml"
    rows = sorted((ROOT / "results").rglob("*.csv"))
    outside |= {path.relative_to(ROOT).as_posix(): path for path in rows}
    for place, path in outside.items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""
    place = page.file.src_uri
    if place == "index.md":
        text = re.sub(r"(\]\(|src=\")docs/", r"\1", text)
    elif place.startswith("results/"):
        text = text.replace("](../docs/", "](../")
    else:
        text = text.replace("](../results/", "](results/").replace("](../README.md", "](index.md")
    return text
