"""The page at `/page`: chat with the model, and blind comparison of two models by people.

Its files are static and the same for everybody, so they need no key; whatever the page asks the API needs one as ever.
"""

from importlib import resources
from typing import NamedTuple

from fastapi import FastAPI, Request, Response

PACKAGE, FOLDER = "ray_ds.serve.http", "page_files"


class PageFile(NamedTuple):
    """A file of the page."""

    name: str
    media_type: str


PAGE_FILES = {
    "/page": PageFile("page.html", "text/html"),
    "/page/page.css": PageFile("page.css", "text/css"),
    "/page/page.mjs": PageFile("page.mjs", "text/javascript"),
}
"""By path; links between them are relative, so that they hold behind any route prefix."""

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
"""Nothing but the page's own files runs, and what is typed into it goes nowhere but to the address it came from."""

HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Add the page's routes, which are no part of the API's document."""
    for path, file in PAGE_FILES.items():
        _add_file(app, path, file)


def _add_file(app: FastAPI, path: str, file: PageFile) -> None:
    content = resources.files(PACKAGE).joinpath(FOLDER, file.name).read_bytes()

    async def route(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=f"{file.media_type}; charset=utf-8")

    app.get(path, include_in_schema=False)(route)
