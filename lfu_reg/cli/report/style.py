"""How the page looks: in the reader's light or dark, and no wider than a phone."""

STYLE = """
:root {
  --text: #1b1f24; --quiet: #57606a; --page: #ffffff; --box: #f6f8fa; --line: #d0d7de; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e6edf3; --quiet: #9198a1; --page: #0d1117; --box: #161b22; --line: #30363d; --accent: #56b4e9;
  }
  img { filter: invert(.93) hue-rotate(180deg); }  /* white paper becomes dark, and colours keep their hues */
}
* { box-sizing: border-box; }
body {
  background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 72rem; overflow-wrap: anywhere; padding: 1.5rem 1rem 3rem;
}
header p, footer, small, dt { color: var(--quiet); }
header p { margin: 0; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.verdict, article {
  background: var(--box); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem;
}
.verdict { border-left: .3rem solid var(--accent); }
.verdict p { margin: .4rem 0; }
.answer { font-size: 1.15rem; font-weight: 600; }
img { background: #ffffff; border-radius: .5rem; display: block; height: auto; max-width: 100%; padding: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; }
th:first-child { font-weight: 600; text-align: left; white-space: pre; }
article { margin: 0 0 1rem; }
.question { font-weight: 600; margin: 0 0 .5rem; white-space: pre-wrap; }
dl { display: grid; gap: .2rem 1rem; grid-template-columns: minmax(6rem, 14rem) 1fr; margin: 0; }
dd { margin: 0; white-space: pre-wrap; }
footer { border-top: 1px solid var(--line); font-size: .85rem; margin-top: 2.5rem; padding-top: .8rem; }
@media (max-width: 34rem) {
  th:first-child { min-width: 8rem; white-space: pre-wrap; }
  dl { display: block; }
  dd { margin: 0 0 .5rem; }
}
"""
