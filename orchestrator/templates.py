"""What a report looks like: its Markdown and its HTML, both rendered with autoescape on.

File names, labels and metric names come from a user's bucket, so they are never trusted: `cell`
keeps them inside their Markdown table, autoescape inside their HTML element.
"""

import re

import jinja2
import markupsafe

_MARKDOWN_MARKS = re.compile(r"([\\`*\[\]|~])")

_MARKDOWN = """\
# {{ name | cell }}

{{ outcome | cell }}
{% if verdict %}

{{ verdict | cell }}
{% endif %}
{% for title, head, rows, note in tables %}

## {{ title }}

{{ note | cell }}

{% if rows %}
| {{ head | join(" | ") }} |
|{{ " --- |" * (head | length) }}
{% for row in rows %}
| {{ row | map("cell") | join(" | ") }} |
{% endfor %}
{% endif %}
{% if title == pictures_after and pictures %}

## Curves

{% for picture in pictures %}
![{{ picture.alt | cell }}]({{ picture.file }})

{% endfor %}
{% for line in notes %}
{{ line | cell }}

{% endfor %}
{% endif %}
{% endfor %}
"""

_HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ name }}</title>
<style>
body { max-width: 54rem; margin: 2.5rem auto; padding: 0 1.25rem; background: #fff;
  color: #1f2933; font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.1rem; }
p.outcome { margin: 0; padding: .75rem 1rem; border-left: 4px solid #1f77b4;
  background: #f3f7fb; font-size: 1.05rem; overflow-wrap: anywhere; }
p.failed { border-color: #c0392b; background: #fdf3f2; }
p.verdict { margin: .6rem 0 0; padding: 0 1rem; }
p.note { color: #5c6b7a; margin: .3rem 0 .6rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; color: #5c6b7a; font-weight: 600; font-size: .85rem; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #e6eaee;
  vertical-align: top; overflow-wrap: anywhere; }
td:first-child { min-width: 9rem; }
img { display: block; max-width: 100%; height: auto; margin: .4rem 0 1rem; }
footer { margin-top: 2.5rem; color: #8593a0; font-size: .85rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p class="outcome{{ ' failed' if failed }}">{{ outcome }}</p>
{% if verdict %}
<p class="verdict">{{ verdict }}</p>
{% endif %}
{% for title, head, rows, note in tables %}
<h2>{{ title }}</h2>
{% if note %}
<p class="note">{{ note }}</p>
{% endif %}
{% if rows %}
<table>
{% if head[0] %}
<tr>{% for word in head %}<th>{{ word }}</th>{% endfor %}</tr>
{% endif %}
{% for row in rows %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
{% if title == pictures_after and pictures %}
<h2>Curves</h2>
{% for picture in pictures %}
<img src="{{ picture.data_uri }}" alt="{{ picture.alt }}">
{% endfor %}
{% for line in notes %}
<p class="note">{{ line }}</p>
{% endfor %}
{% endif %}
{% endfor %}
<footer>{{ run }}</footer>
</body>
</html>
"""


def cell(text: object) -> markupsafe.Markup:
    """Return untrusted text as the inside of a Markdown paragraph or table cell."""
    one_line = " ".join(str(text).split())
    return markupsafe.Markup(_MARKDOWN_MARKS.sub(r"\\\1", markupsafe.escape(one_line)))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = cell
    return environment


def render_markdown(context: dict[str, object]) -> str:
    """Return the report as Markdown whose pictures are files beside it."""
    text = _environment().from_string(_MARKDOWN).render(context)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def render_html(context: dict[str, object]) -> str:
    """Return the report as one HTML file."""
    return _environment().from_string(_HTML).render(context)
