"""The page /docs, rendered from the OpenAPI description: plain HTML that loads nothing from elsewhere.

FastAPI's own page loads Swagger from a content delivery network, which a hospital's network may not reach, and the
package swagger-ui-bundle contains a Swagger of 2022 that does not support OpenAPI 3.1.
"""

from typing import Any

from lungjax.report import render

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def page(tree: dict[str, Any], token: bool) -> str:
    """Returns the page of an OpenAPI description; with `token` the examples send one."""
    return render.render("openapi.html.j2", title=tree["info"]["title"], tree=tree, token=token)
