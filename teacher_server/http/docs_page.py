"""The published schema as one page that needs nothing else: no script and no other host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 960px; margin: 0 auto; padding: 20px; font: 15px/1.5 system-ui, sans-serif; }
h2 { margin: 32px 0 4px; font: 600 17px/1.4 ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; margin: 8px 0; }
th, td { text-align: left; vertical-align: top; padding: 4px 12px 4px 0;
  border-bottom: 1px solid light-dark(#d9dde4, #323a46); }
td:first-child, td:nth-child(2), code { font: 13.5px/1.5 ui-monospace, monospace; }
p { margin: 4px 0; }
.kind { color: light-dark(#596273, #9ca6b6); }
"""
Schema = Mapping[str, Any]


def docs_page(openapi: Schema) -> str:
    """Every path with its requests and answers, and every schema that they name, as HTML."""
    title = escape(f"{openapi['info']['title']} {openapi['info']['version']}")
    return "".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>{title}</h1>',
            "<p>The same for programs: <code>/openapi.json</code>.</p>",
            *_paths(openapi),
            "<h1>Schemas</h1>",
            *_schemas(openapi.get("components", {}).get("schemas", {})),
            "</body></html>\n",
        ]
    )


def _paths(openapi: Schema) -> Iterator[str]:
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            yield f"<h2>{escape(method.upper())} {escape(path)}</h2>"
            yield f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p>"
            rows = [
                (f"parameter {each['name']}", _type(each["schema"]), each.get("description", ""))
                for each in operation.get("parameters", ())
            ]
            for kind, body in operation.get("requestBody", {}).get("content", {}).items():
                rows.append((f"request, {kind}", _type(body["schema"]), ""))
            for status, answer in operation["responses"].items():
                for kind, body in answer.get("content", {}).items():
                    what = _type(body.get("schema", {}))
                    rows.append((f"{status}, {kind}", what, answer.get("description", "")))
            yield _table(rows)


def _schemas(schemas: Mapping[str, Schema]) -> Iterator[str]:
    for name, schema in schemas.items():
        yield f'<h2 id="{escape(name)}">{escape(name)}</h2>'
        yield f"<p>{escape(schema.get('description', ''))}</p>"
        needed = schema.get("required", ())
        fields = schema.get("properties", {})
        if not fields:
            yield f"<p class=kind>{_type(schema)}</p>"
            continue
        yield _table(
            (
                field + ("" if field in needed else " (optional)"),
                _type(part) + _default(part),
                part.get("description", ""),
            )
            for field, part in fields.items()
        )


def _default(schema: Schema) -> str:
    value = schema.get("default")
    return "" if value is None else f" = {escape(repr(value))}"


def _type(schema: Schema) -> str:
    """A schema in a few words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(map(_type, schema[several]))
    if "const" in schema:
        return escape(repr(schema["const"]))
    if "enum" in schema:
        return " or ".join(escape(repr(value)) for value in schema["enum"])
    kind = escape(str(schema.get("type", "any")))
    if kind == "array":
        parts = schema.get("prefixItems") or [schema.get("items", {})]
        kind = f"array of {', '.join(map(_type, parts))}"
    limits = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "to {}",
        "exclusiveMaximum": "below {}",
        "minLength": "characters: {} or more",
        "maxLength": "characters: {} at most",
        "minItems": "{} or more",
        "maxItems": "{} at most",
    }
    told = [text.format(_number(schema[name])) for name, text in limits.items() if name in schema]
    return kind + (f" ({', '.join(told)})" if told else "")


def _number(value: float) -> str:
    """FastAPI writes every limit as a float."""
    return str(int(value)) if value == int(value) else str(value)


def _table(rows: Any) -> str:
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{kind}</td><td>{escape(text)}</td></tr>"
        for name, kind, text in rows
    )
    return f"<table>{cells}</table>"
