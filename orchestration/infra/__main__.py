"""`python -m orchestration.infra` renders infra/ from infra/example.yaml; a test fails while the folder is stale."""

import sys
from dataclasses import replace
from pathlib import Path

from orchestration.infra.render import FILES, Settings, render_files

FOLDER = Path(__file__).parents[2] / "infra"
EXAMPLE = FOLDER / "example.yaml"
PLAIN = Settings(image="ghcr.io/example/mapo:0.1.0")
SETTINGS = {
    "kuberay-cluster": replace(PLAIN, redis="redis.redis:6379"),
    "aws": replace(PLAIN, spot=True, identity="arn:aws:iam::123456789012:instance-profile/mapo"),
    "gcp": replace(PLAIN, spot=True, project="vision-1234", identity="mapo@vision-1234.iam.gserviceaccount.com"),
}
"""Options of the targets that differ from `PLAIN`."""


def pages() -> dict[Path, str]:
    """Render every file of infra/."""
    return {
        FOLDER / target / name: text
        for target in FILES
        for name, text in render_files(EXAMPLE, [], target, SETTINGS.get(target, PLAIN)).items()
    }


if __name__ == "__main__":
    for page, content in pages().items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(content)
        sys.stdout.write(f"{page}\n")
