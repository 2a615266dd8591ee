"""The frame of the report: one HTML page with its style inside, readable on a phone, in light and in dark."""

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#16202b;--soft:#5b6875;--line:#dde3e9;--accent:#0b63ce;
--good:#12734a;--bad:#b3261e;--first:#9aa7b4;--mark:#16202b;
--d0:#2f7fc1;--d1:#7fb2dc;--d2:#c3dcef;--d3:#edf0f2;--d4:#fbd3b4;--d5:#f0975a;--d6:#cf4f17;
--s0:#f1f4f7;--s1:#d9e7f5;--s2:#b5d1ee;--s3:#86b4e2;--s4:#5593d3;--s5:#2b72bd;--s6:#12539a;--s7:#083a70;
--r0:#0b7fab;--r1:#e08a00;--r2:#7b4fc9;--r3:#1d9a5b;--r4:#d1477a;--r5:#6a7a12;--r6:#b0532a;--r7:#4a67d6}
@media(prefers-color-scheme:dark){:root{--page:#10151b;--card:#182029;--ink:#e7edf3;--soft:#95a3b1;--line:#2b3641;
--accent:#6db1ff;--good:#5fd39a;--bad:#ff8a80;--first:#5d6b79;--mark:#fff;
--d0:#4aa0e8;--d1:#35719f;--d2:#26475f;--d3:#27313b;--d4:#5c4130;--d5:#a5612f;--d6:#ee7f3b;
--s0:#202a34;--s1:#213a52;--s2:#244d73;--s3:#2a6497;--s4:#3a80bd;--s5:#57a0dd;--s6:#86c1f0;--s7:#c4e2fb;
--r0:#3fb6e0;--r1:#f2ad3d;--r2:#a98bea;--r3:#4cc98a;--r4:#ef7fa6;--r5:#b3c24a;--r6:#dd8a5f;--r7:#8ea4f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}
header p.kicker{margin:0 0 6px;color:var(--soft);font-size:14px}
h1{font-size:clamp(22px,3.4vw,34px);line-height:1.22;margin:0 0 14px;letter-spacing:-.01em;text-wrap:balance}
h2{font-size:20px;line-height:1.3;margin:0 0 4px}
h3{font-size:15px;margin:0 0 8px;font-weight:600}
p.note{margin:0 0 16px;color:var(--soft);max-width:75ch}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;margin-top:18px}
.check{display:inline-block;
margin:0 0 4px;font-size:14px;border-left:3px solid var(--good);padding-left:10px;max-width:90ch}
.check.bad{border-color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.tile b{display:block;font-size:26px;line-height:1.2;letter-spacing:-.01em}
.tile b s{font-size:17px;color:var(--soft);text-decoration:none;font-weight:400}
.tile span{color:var(--soft);font-size:13px;line-height:1.35;display:block}
.tile em{font-style:normal;font-weight:600;color:var(--good)}.tile em.bad{color:var(--bad)}
.row+.row,.scroll+.key,.scroll+.row,.row+.key{margin-top:22px}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:22px 28px}
figure{margin:0;min-width:0}
figcaption{font-size:13px;color:var(--soft);margin-top:4px}
.small{display:grid;gap:10px 14px}
.small figure h3{font-size:13px;margin-bottom:4px}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
.row svg.chart{max-width:440px}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
svg text.muted{fill:var(--soft)}svg text.label{font-size:12px}svg text.value{font-size:12px;font-weight:600}
.pixels{image-rendering:pixelated}.pixels.dark{display:none}
@media(prefers-color-scheme:dark){.pixels.dark{display:inline}.pixels.light{display:none}}
.hover{fill:transparent}.hover:hover{stroke:var(--ink);stroke-width:1.2}
details{margin-top:16px}summary{cursor:pointer;color:var(--accent);font-size:14px;margin-bottom:10px}
table.origin td,table.origin th{text-align:left}table.origin td{min-width:9em;font-size:13px;overflow-wrap:anywhere}
table.origin{margin-top:18px}
svg text.s4,svg text.s5,svg text.s6,svg text.s7,svg text.t0,svg text.t6{fill:#fff}
@media(prefers-color-scheme:dark){svg text.s5,svg text.s6,svg text.s7,svg text.t0,svg text.t6{fill:#0c1218}}
.block{fill:none;stroke:var(--ink);stroke-width:1.1}
.bar{fill:var(--accent)}.bar.first{fill:var(--first)}.mark{stroke:var(--mark);stroke-width:2.2;fill:none}
.grid{stroke:var(--line);fill:none}.front{stroke:var(--accent);stroke-width:1.5;stroke-dasharray:5 4;fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.line.dashed{stroke-width:1.3;stroke-dasharray:4 3}
.line.c0,.dot.c0{stroke:var(--r0)}.dot.c0{fill:var(--r0)}.line.c1,.dot.c1{stroke:var(--r1)}.dot.c1{fill:var(--r1)}.line.c2,.dot.c2{stroke:var(--r2)}.dot.c2{fill:var(--r2)}
.line.c3,.dot.c3{stroke:var(--r3)}.dot.c3{fill:var(--r3)}.line.c4,.dot.c4{stroke:var(--r4)}.dot.c4{fill:var(--r4)}.line.c5,.dot.c5{stroke:var(--r5)}.dot.c5{fill:var(--r5)}
.line.c6,.dot.c6{stroke:var(--r6)}.dot.c6{fill:var(--r6)}.line.c7,.dot.c7{stroke:var(--r7)}.dot.c7{fill:var(--r7)}
.seen{stroke:var(--ink);stroke-width:1.5;fill:none}svg text.number{font-weight:600;fill:#fff}
.event{fill:var(--accent)}.event.good{fill:var(--good)}.event.bad{fill:var(--bad)}
table.events td{text-align:left}table.events td:first-child{white-space:nowrap;width:1%}
.scroll+p.note{margin:10px 0 0}
.r0{fill:var(--r0)}.r1{fill:var(--r1)}.r2{fill:var(--r2)}.r3{fill:var(--r3)}.r4{fill:var(--r4)}.r5{fill:var(--r5)}
.r6{fill:var(--r6)}.r7{fill:var(--r7)}.move{fill-opacity:.26}.stay{fill-opacity:.82}
.key{display:flex;flex-wrap:wrap;
gap:4px 14px;font-size:13px;color:var(--soft);margin:0 0 14px;padding:0;list-style:none}
.key i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.key i.tick{width:3px;height:14px;border-radius:0;vertical-align:-2px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:8px 0 8px 14px;text-align:right;vertical-align:top;border-top:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;padding-left:0;font-weight:400}tbody th{font-weight:400}
thead th{border-top:0;font-weight:600;line-height:1.3}
thead th small,td small{display:block;color:var(--soft);font-weight:400;font-size:12px}
td.best{font-weight:700;color:var(--good)}
dl{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:6px 18px;margin:0;font-size:14px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:640px){main{padding:18px 12px 32px}section{padding:16px 14px}th,td{padding-left:8px;font-size:13px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}.tiles{grid-template-columns:1fr 1fr}.tile b{font-size:21px}
.tile b s{font-size:14px}.small{grid-template-columns:repeat(2,1fr)!important;grid-template-rows:none!important;
grid-auto-flow:row!important}}
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole document that needs nothing from anywhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body>\n</html>\n"
    )


def section(title: str, note: str, content: Sequence[str]) -> str:
    """A card with a heading and a sentence that says how to read it."""
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{"".join(content)}</section>'


def figure(title: str, drawing: str, caption: str = "") -> str:
    """A drawing with its heading."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{drawing}{below}</figure>"


def row(figures: Sequence[str]) -> str:
    """Drawings side by side where there is room."""
    return f'<div class="row">{"".join(figures)}</div>'


def details(title: str, figures: Sequence[str]) -> str:
    """Drawings that are shown on demand."""
    return f"<details><summary>{escape(title)}</summary>{row(figures)}</details>"


def key(entries: Sequence[tuple[str, str]], *, tick: str = "", title: str = "") -> str:
    """A legend of (colour variable, meaning).

    Args:
        entries: what to explain.
        tick: what marks in bars mean; "" = there are none.
        title: what the numbers are.
    """
    items = f"<li>{escape(title)}:</li>" if title else ""
    items += "".join(f'<li><i style="background:var(--{name})"></i>{escape(words)}</li>' for name, words in entries)
    if tick:
        items += f'<li><i class="tick" style="background:var(--mark)"></i>{escape(tick)}</li>'
    return f'<ul class="key">{items}</ul>'


def definitions(entries: Mapping[str, object]) -> str:
    """A list of names and what they are."""
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>' for k, v in entries.items())}</dl>"
