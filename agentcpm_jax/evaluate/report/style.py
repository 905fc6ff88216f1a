"""The style of `why_page`: five colour scales over the same tokens, one chosen by radio button."""

from __future__ import annotations

PROVENANCE = {0: "#eef0f3", 1: "#cfe4f5", 2: "#e6d9f2", 3: "#dfe3e8", 4: "#d5eee3", 5: "#fbe6c4"}
# Okabe and Ito's blue and vermilion, from faint to full: they stay apart for the colour-blind.
UP = ("#f4f6f8", "#d6e8f5", "#9cc9e8", "#4d9fd6")
DOWN = ("#f4f6f8", "#fbe2d3", "#f3b58f", "#e5803f")
DEPTH = ("#f7f5fb", "#ece4f6", "#dbcced", "#c8b2e4", "#b496da", "#a07bd0")
AGE = ("#f4f6f8", "#e3efe9", "#bcdccd", "#86c2a8", "#4aa37f")


def _scale(number: int, rules: dict[str, str]) -> str:
    return "".join(
        f"#by-{number}:checked~.samples .{name},.of-{number} .{name}{{background:{colour}}}"
        for name, colour in rules.items()
    )


_COLOURS = (
    _scale(0, {f"p{k}": c for k, c in PROVENANCE.items()})
    + _scale(1, {f"a{k}": c for k, c in enumerate(UP)} | {f"am{k}": c for k, c in enumerate(DOWN)})
    + _scale(2, {f"l{k}": c for k, c in enumerate(DEPTH)})
    + _scale(3, {f"c{k}": c for k, c in enumerate(UP)} | {f"cm{k}": c for k, c in enumerate(DOWN)})
    + _scale(4, {f"g{k}": c for k, c in enumerate(AGE)})
    + "".join(f"#by-{n}:checked~.of-{n}{{display:flex}}" for n in range(5))
)

STYLE = f"""
body{{display:block;padding:0 1.5rem 4rem}}
main{{max-width:76rem;margin:0 auto}}
h1{{font-size:1.55rem;overflow-wrap:anywhere;unicode-bidi:isolate}}
.facts{{margin:.5rem 0 1rem}}
.scale>input{{position:absolute;opacity:0}}
.scale>span{{color:var(--muted);font-size:13.5px;margin-right:.5rem}}
.scale>label{{display:inline-block;border:1px solid var(--line);padding:.16rem .7rem;
font-size:13.5px;
cursor:pointer;margin-right:-1px;background:#fff}}
.scale>label:first-of-type{{border-radius:6px 0 0 6px}}
.scale>label:last-of-type{{border-radius:0 6px 6px 0}}
.scale>input:checked+label{{background:var(--accent);color:#fff;border-color:var(--accent)}}
.scale>input:focus-visible+label{{outline:2px solid var(--ink);outline-offset:1px}}
.legend{{display:none;flex-wrap:wrap;gap:.3rem;margin:.6rem 0 .2rem;position:sticky;top:0;z-index:2;
background:#fff;padding:.35rem 0;border-bottom:1px solid var(--line)}}
.legend i{{padding:.05rem .5rem;font-size:12.5px}}
i{{font-style:normal;border-radius:3px}}
.sample{{border:1px solid var(--line);border-radius:6px;margin:.8rem 0;scroll-margin-top:3rem}}
.sample>summary{{padding:.55rem .9rem;background:var(--soft);border-radius:6px;font-size:14px}}
.sample>.facts{{padding:.5rem .9rem 0;margin:0}}
.verdict{{font-weight:650;display:inline-block;min-width:9rem}}
.verdict.right{{color:#00704f}}.verdict.wrong{{color:#a8410a}}.verdict.unknown{{color:var(--muted)}}
.size{{color:var(--muted);font-size:13px}}
.step{{display:grid;grid-template-columns:8.5rem minmax(0,1fr);gap:1rem;padding:.6rem .9rem}}
.step+.step{{border-top:1px solid #eef1f4}}
.where{{margin:0;font-size:13px;font-weight:650}}.where small{{font-weight:400;color:var(--muted)}}
.flag{{display:block;width:fit-content;margin:.25rem 0 0;padding:0 .4rem;border-radius:4px;
font-size:11.5px;font-weight:500;background:#fdf0e9;color:#8f3708}}
.flag.decided{{background:#efe7f8;color:#5b2d86}}
.tokens{{font:13px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;margin:0 0 .4rem}}
.tokens i{{padding:.12em 0;unicode-bidi:isolate;box-shadow:inset -1px 0 #fff}}
.tokens .p0,.tokens .p3,.tokens .p4,.tokens .p5{{color:#4d5866}}
.tokens .y{{color:#0b1f33}}
.n{{color:#7a3410;text-decoration:line-through;text-decoration-color:#d0703a}}
.tokens s{{color:#a3adb8;text-decoration:none}}
.tokens i:hover{{outline:2px solid var(--ink);outline-offset:0}}
.tokens i:hover::after{{content:attr(data-t);position:fixed;left:0;right:0;bottom:0;z-index:9;
background:#14202b;color:#fff;padding:.6rem 1.4rem;white-space:pre-wrap;text-decoration:none;
direction:ltr;font:13.5px/1.5 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}}
.called,.result{{font-size:13px;border-radius:5px;padding:.2rem .6rem;margin:0 0 .3rem;
overflow-wrap:anywhere;unicode-bidi:isolate}}
.called{{background:#eaf3fa;border:1px solid #c2dcee}}
.called.broken{{background:#fdf0e9;border-color:#efc9b2}}.called small{{color:var(--muted)}}
.result{{background:#f4faf7;border:1px solid #d5ebe1}}
.result.tool_error,.result.bad_arguments,.result.infra_error{{background:#fdf0e9;
border-color:#efc9b2}}
.result pre{{background:none;border:0;padding:.3rem 0;margin:0}}
.fork{{margin:.4rem .9rem;padding:.25rem .7rem;border-left:3px solid #a07000;background:#fdf7e6;
font-size:13px}}
.step summary{{font-size:12.5px;color:var(--muted)}}
details[open]>summary{{margin-bottom:.3rem}}
@media(max-width:48rem){{.step{{display:block}}}}
{_COLOURS}
"""
