"""The page of a report, for Jinja2 with autoescape. The policy in its head forbids every script and every address."""

from __future__ import annotations

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1d2126; --dim: #5c6570; --back: #ffffff; --panel: #f4f6f8; --rule: #d8dee4;
        --line: #1f6feb; --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e7ec; --dim: #9aa4af; --back: #14171b; --panel: #1d2228; --rule: #333b44; --line: #6cb0ff;
          --good: #57c473; --bad: #ff8f87; }
}
@media print {
  :root { color-scheme: light; --text: #000; --dim: #444; --back: #fff; --panel: #f4f4f4; --rule: #bbb; --line: #1f6feb;
          --good: #1a7f37; --bad: #b3261e; }
  h2, h3 { break-after: avoid; }
  figure, .sample, tr { break-inside: avoid; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.2rem; background: var(--back); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .3rem; border-top: 1px solid var(--rule); padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
a { color: var(--line); }
.dim { color: var(--dim); font-size: .9rem; font-weight: 400; }
.dim p, p.dim { margin: .2rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .7rem .45rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--dim); font-weight: 600; font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem;
          margin-top: 1rem; }
figure { margin: 0; padding: .7rem .8rem; background: var(--panel); border-radius: 8px; }
figcaption { font-size: .88rem; font-weight: 600; margin-bottom: .3rem; }
figcaption span { font-weight: 400; color: var(--dim); white-space: nowrap; }
svg { display: block; width: 100%; height: auto; }
.steps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 1.5rem; }
.sample { background: var(--panel); border-radius: 8px; padding: .6rem .8rem; margin-bottom: .8rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace; }
.prompt { color: var(--dim); }
.answer { border-left: 3px solid var(--rule); padding-left: .6rem; margin-top: .6rem; }
.answer.good { border-color: var(--good); }
.answer.bad { border-color: var(--bad); }
.verdict { font-size: .8rem; color: var(--dim); overflow-wrap: anywhere; }
.good b { color: var(--good); }
.bad b { color: var(--bad); }
details { margin-top: 1rem; }
summary { cursor: pointer; }
details pre { background: var(--panel); border-radius: 8px; padding: .8rem; margin-top: .5rem; }
@media (max-width: 720px) {
  thead { display: none; }
  table, tbody, tr, td { display: block; }
  tr { border-bottom: 1px solid var(--rule); padding: .5rem 0; }
  td { border: 0; padding: .1rem 0; display: grid; grid-template-columns: 8.5rem 1fr; gap: .5rem; }
  td::before { content: attr(data-name); color: var(--dim); font-size: .85rem; }
}
</style>
</head>
<body>
<h1>{{ title }}</h1>
<table>
<thead><tr><th>run</th><th>stage</th><th>from</th><th>steps</th><th>training time</th><th>held-out metric</th>
<th>before</th><th>after</th></tr></thead>
<tbody>
{% for run in sections %}
<tr>
<td data-name="run"><a href="#run-{{ loop.index }}">{{ run.name }}</a></td>
<td data-name="stage">{{ run.stage }}{% if run.status != "finished" %} ({{ run.status }}){% endif %}</td>
<td data-name="from">{{ run.origin or "scratch" }}</td>
<td data-name="steps">{{ run.steps }}</td>
<td data-name="training time">{{ run.seconds | clock }}</td>
{% if run.held_out %}
<td data-name="held-out metric"><span>{{ run.held_out.metric | replace("_", " ") }}
{%- if run.held_out.note %} <span class="dim">({{ run.held_out.note }})</span>{% endif %}</span></td>
<td data-name="before">{{ run.held_out.before | estimate(run.held_out.metric) }}</td>
<td data-name="after">{{ run.held_out.after | estimate(run.held_out.metric) }}</td>
{% else %}
<td data-name="held-out metric">–</td><td data-name="before">–</td><td data-name="after">–</td>
{% endif %}
</tr>
{% endfor %}
</tbody>
</table>
<p class="dim">Held-out data is never trained on. In brackets: 95 % interval. Training time is that of rollouts and
optimiser steps, without evaluation.</p>

{% for run in sections %}
<section>
<h2 id="run-{{ loop.index }}">{{ run.name }} <span class="dim">{{ run.stage }} from {{ run.origin or "scratch" }},
{{ run.status }}</span></h2>
{% if not run.charts %}
<p class="dim">Nothing was logged.</p>
{% endif %}
<div class="charts">
{% for chart in run.charts %}
<figure>
<figcaption>{{ chart.curve.title }}
{% if chart.ends %}<span>{{ chart.ends | map("short") | join(" → ") }}</span>{% endif %}</figcaption>
{% if chart.svg %}{{ chart.svg }}{% endif %}
{% if chart.curve.num_missing %}
<p class="dim">{{ chart.curve.num_missing }} of {{ chart.curve.values | length }} values were not finite numbers.</p>
{% endif %}
</figure>
{% endfor %}
</div>
{% if run.samples %}
<div class="steps">
{% for step in run.samples %}
<div>
<h3>Samples of step {{ step.step }}</h3>
{% for group in step.groups %}
<div class="sample">
<pre class="prompt">{{ group.prompt | visible }}</pre>
{% for answer in group.rows %}
{% set is_bad = answer.reward is not none and answer.verdicts and answer.reward <= 0 %}
{% set is_good = answer.reward is not none and answer.verdicts and answer.reward > 0 %}
<div class="answer{% if is_good %} good{% elif is_bad %} bad{% endif %}">
<pre>{{ answer.text | visible }}</pre>
<div class="verdict">
{%- if answer.verdicts %}<b>reward {{ answer.reward | short if answer.reward is not none else "none" }}</b>
{% for verdict in answer.verdicts %} · {{ verdict.name }}: {{ verdict.status }}
{%- if verdict.detail %} ({{ verdict.detail | visible }}){% endif %}{% endfor %}
{% endif %}
{% if answer.is_cut %}{{ " · " if answer.verdicts }}cut at the token limit{% endif %}
</div>
</div>
{% endfor %}
</div>
{% endfor %}
</div>
{% endfor %}
</div>
{% endif %}
{% if run.warning %}
<p><strong>{{ run.warning }}</strong></p>
{% endif %}
<details><summary>Configuration, and where it was made</summary>
<div class="dim">
{% for name, fact in run.facts.items() %}
<p>{{ name }}: {{ fact }}</p>
{% endfor %}
</div>
<pre>{{ run.config }}</pre>
</details>
</section>
{% endfor %}
</body>
</html>
"""
