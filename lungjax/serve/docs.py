"""The page /docs, written from the OpenAPI description: plain HTML that loads nothing from anywhere.

FastAPI's own page loads Swagger from a content delivery network, which a hospital's network doesn't reach, and the
package swagger-ui-bundle holds a Swagger of 2022 that can't read OpenAPI 3.1.
"""

import json
from html import escape
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 0.875rem/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; padding: 0.75rem; border: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
h2 { margin-top: 3rem; border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding-top: 1rem; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: 0.2rem 1rem 0.2rem 0; }
"""


def page(tree: dict[str, Any], token: bool) -> str:
    """Returns the page of an OpenAPI description; with `token` the examples send one."""
    parts = [
        f"<h1>{escape(tree['info']['title'])}</h1><p>{escape(tree['info']['description'])}</p>",
        '<p>As OpenAPI: <a href="openapi.json">openapi.json</a>. <a href=".">The page for people</a>.</p>',
    ]
    if token:
        parts.append("<p>All but /health want the service's token: <code>Authorization: Bearer TOKEN</code>.</p>")
    for path, methods in tree["paths"].items():
        parts += [_operation(path, method, told, tree, token) for method, told in methods.items()]
    parts.append("<h2>Objects</h2>")
    for name, schema in tree["components"]["schemas"].items():
        described = escape(schema.get("description", ""))
        fields = "".join(_field(key, value, schema) for key, value in schema.get("properties", {}).items())
        parts.append(f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{described}</p><table>{fields}</table>')
    head = f"<meta charset=utf-8><title>{escape(tree['info']['title'])}</title><style>{STYLE}</style>"
    return f"<!DOCTYPE html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _operation(path: str, method: str, told: dict[str, Any], tree: dict[str, Any], token: bool) -> str:
    parts = [f"<h2><code>{method.upper()} {escape(path)}</code></h2>", f"<p>{escape(told.get('description', ''))}</p>"]
    rows = "".join(
        f"<tr><td><code>{escape(one['name'])}</code></td><td>{escape(one.get('description', ''))}</td></tr>"
        for one in told.get("parameters", [])
    )
    if rows:
        parts.append(f"<h3>Query</h3><table>{rows}</table>")
    body = told.get("requestBody")
    if body:
        kinds = ", ".join(f"<code>{escape(kind)}</code>" for kind in body["content"])
        parts.append(f"<h3>Body</h3><p>{escape(body['description'])} Content types: {kinds}.</p>")
    send = " -F files=@slice.png -F files=@scan.dcm" if body else ""
    bearer = ' -H "Authorization: Bearer $TOKEN"' if token and path != "/health" else ""
    parts.append(f"<pre>curl{escape(bearer + send)} http://127.0.0.1:8000{escape(path)}</pre>")
    answers = "".join(
        f"<tr><td>{status}</td><td>{escape(one['description'])}</td><td>{_content(one)}</td></tr>"
        for status, one in sorted(told["responses"].items())
    )
    return "".join(parts) + f"<h3>Answers</h3><table>{answers}</table>"


def _content(answer: dict[str, Any]) -> str:
    shown = []
    for kind, one in answer.get("content", {}).items():
        shown.append(f"<code>{escape(kind)}</code> {_type(one.get('schema', {}))}")
    return "<br>".join(shown)


def _field(name: str, schema: dict[str, Any], owner: dict[str, Any]) -> str:
    needed = "" if name in owner.get("required", []) else " (optional)"
    words = escape(schema.get("description", "")) + needed
    return f"<tr><td><code>{escape(name)}</code></td><td>{_type(schema)}</td><td>{words}</td></tr>"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"{{name: {_type(schema['additionalProperties'])}}}"
    return escape(str(schema.get("type", json.dumps(schema) if schema else "anything")))
