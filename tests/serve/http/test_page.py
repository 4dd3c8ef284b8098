"""The page's files as they are served: open, whole behind a route prefix, and with nothing from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx

from ray_ds.serve.http import page

FILES = Path(page.__file__).parent / "page_files"


def test_the_files_need_no_key_and_may_load_nothing_from_elsewhere(url: str) -> None:
    for path, file in page.PAGE_FILES.items():
        response = httpx.get(f"{url}{path}")
        assert response.status_code == 200
        assert response.content == (FILES / file.name).read_bytes()
        assert response.headers["content-type"] == f"{file.media_type}; charset=utf-8"
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy
        assert "unsafe" not in policy and "*" not in policy
    for path in ("/page/", "/page/page.py", "/page/../v1/models", "/page/%2e%2e/metrics", "/pages"):
        assert httpx.get(f"{url}{path}").status_code == 401, path
    assert httpx.post(f"{url}/page").status_code == 405


def test_the_page_is_whole_behind_a_route_prefix(both: str) -> None:
    address = httpx.URL(f"{both}/a/page")
    for link in links(httpx.get(address).text):
        assert address.join(link).path.startswith("/a/page/")
        assert httpx.get(address.join(link)).status_code == 200


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def tags(html: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Tags()
    parser.feed(html)
    return parser.tags


def links(html: str) -> list[str]:
    found = [own.get("href") or own.get("src") for _, own in tags(html)]
    return [link for link in found if link and not link.startswith("data:")]


def test_every_resource_is_the_pages_own_and_nothing_is_inline() -> None:
    html = (FILES / "page.html").read_text()
    assert {f"/{link}" for link in links(html)} == set(page.PAGE_FILES) - {"/page"}
    for tag, own in tags(html):
        assert tag != "style" and (tag != "script" or own.get("src"))
        assert not any(name == "style" or name.startswith("on") for name in own)
    module = (FILES / "page.mjs").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|cookie", module)
    assert "://" not in module and "url(" not in (FILES / "page.css").read_text()


def test_the_code_names_only_elements_that_the_document_has() -> None:
    module = (FILES / "page.mjs").read_text()
    ids = [own["id"] for _, own in tags((FILES / "page.html").read_text()) if "id" in own]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\b(?:byId|show|on)\("([a-z-]+)"', module)) <= set(ids)
    assert {f"{side}-{what}" for side in ("left", "right") for what in ("text", "fluency", "logic", "accuracy")} <= set(
        ids
    )
