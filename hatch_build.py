"""What of a package's description depends on where the repository lies, which nothing in the repository says.

REPO_URL in the environment (the workflows set it) makes the README's relative links absolute and adds the project's
URLs; without it the package page has the links' texts alone, and no link that leads nowhere.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:)([^)\s]+)\)")


def readme_for_a_package_page(text: str, repository: str) -> str:
    """The README whose links work outside of the repository."""

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if target.startswith("#"):
            return found[0]
        if not repository:
            return words
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/HEAD/{target})"

    text = LINK.sub(link, text)
    if not repository:
        return re.sub(
            r"<!-- figure -->.*?<!-- /figure -->|<picture>.*?</picture>|<img [^>]*>", "", text, flags=re.DOTALL
        )
    return re.sub(r'(src|srcset)="(?!https?:)([^"]+)"', rf'\1="{repository}/raw/HEAD/\2"', text)


class Metadata(MetadataHookInterface):
    """Sets `readme` and `urls`."""

    def update(self, metadata: dict) -> None:
        """Called by hatchling with the rest of the project's table."""
        repository = os.environ.get("REPO_URL", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": readme_for_a_package_page(text, repository),
        }
        metadata["urls"] = {"Paper": "https://arxiv.org/abs/2511.13052"}
        if repository:
            metadata["urls"] |= {
                "Repository": repository,
                "Issues": f"{repository}/issues",
                "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
            }
        if site := os.environ.get("SITE_URL"):
            metadata["urls"]["Documentation"] = site
