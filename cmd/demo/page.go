package demo

import (
	"bytes"
	"html/template"
	"net/http"
	"time"

	"github.com/longhouse-go/longhouse/core/session"
)

// pageTemplate needs no script, no font and no second request.
var pageTemplate = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Longhouse session · {{.Node}}</title>
<style>
:root{color-scheme:light dark;--line:#d8d3c8;--soft:#f6f3ec;--ink:#23211d;--dim:#6d675c;--accent:#9a4a1c}
@media (prefers-color-scheme:dark){:root{--line:#413c33;--soft:#26231e;--ink:#ece7dc;--dim:#a49c8c;--accent:#e79a63}}
*{box-sizing:border-box}
body{margin:0;padding:2.5rem 1rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:Canvas}
main{max-width:44rem;margin:0 auto}
h1{font-size:1.5rem;margin:0}
header p{margin:.25rem 0 2rem;color:var(--dim)}
.served{font-size:1.1rem;padding:1rem 1.25rem;border-left:.35rem solid var(--accent);background:var(--soft);border-radius:.25rem}
.served b{font-size:1.35rem;color:var(--accent)}
code{font:.9em ui-monospace,monospace;overflow-wrap:anywhere}
table{width:100%;border-collapse:collapse;margin:.5rem 0 1.5rem}
th,td{text-align:left;vertical-align:top;padding:.5rem .75rem .5rem 0;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
th{width:12rem;font-weight:500;color:var(--dim)}
h2{font-size:1.1rem;margin:2rem 0 .25rem}
form.set{display:flex;flex-wrap:wrap;gap:.75rem;align-items:end}
label{flex:1 1 10rem;font-size:.85rem;color:var(--dim)}
input{display:block;width:100%;padding:.5rem .6rem;font:inherit;color:inherit;background:Canvas;border:1px solid var(--line);border-radius:.3rem}
button{padding:.55rem 1rem;font:inherit;border:1px solid var(--accent);border-radius:.3rem;background:none;color:var(--accent);cursor:pointer}
button.main{background:var(--accent);color:Canvas}
.row{display:flex;gap:.75rem;margin-top:2rem;flex-wrap:wrap}
.dim{color:var(--dim)}
</style>
</head>
<body>
<main>
<header>
<h1>Longhouse session</h1>
<p>Stop the node that served this page and reload: the session goes on elsewhere.</p>
</header>
<p class="served">Served by node <b id="node">{{.Node}}</b></p>
<table>
<tr><th>Session id</th><td><code id="id">{{.ID}}</code></td></tr>
<tr><th>State</th><td id="state">{{if .IsNew}}new{{else}}known{{end}}</td></tr>
<tr><th>Created</th><td>{{.Created}}</td></tr>
<tr><th>Last access</th><td>{{.LastAccess}}</td></tr>
</table>
<h2>Attributes</h2>
{{if .Attributes}}<table id="attributes">
{{range .Attributes}}<tr><th>{{.Name}}</th><td>{{.Value}}</td></tr>
{{end}}</table>{{else}}<p class="dim">None yet. Set one below.</p>{{end}}
<form class="set" method="post" action="{{.Set}}">
<label>Name <input name="dataName" required maxlength="128" autocomplete="off"></label>
<label>Value <input name="dataValue" maxlength="4096" autocomplete="off"></label>
<button class="main">Set</button>
</form>
<div class="row">
<form method="get" action="{{.Self}}"><button>Reload</button></form>
<form method="post" action="{{.Renew}}"><button>New id</button></form>
<form method="post" action="{{.Invalidate}}"><button>Invalidate</button></form>
</div>
</main>
</body>
</html>
`))

// pageView is what the page shows.
type pageView struct {
	Node, ID                     string
	IsNew                        bool
	Created, LastAccess          string
	Attributes                   []attribute
	Self, Set, Renew, Invalidate string
}

func (a *app) page(w http.ResponseWriter, r *http.Request) {
	s, err := session.From(r)
	if err != nil {
		refuse(w, err)
		return
	}
	list, err := attributes(s)
	if err != nil {
		refuse(w, err)
		return
	}
	view := pageView{
		Node: a.node, ID: s.ID(), IsNew: s.IsNew(), Attributes: list,
		Created: clock(s.Created()), LastAccess: clock(s.LastAccess()),
		Self: encode(r, "./"), Set: encode(r, "set"), Renew: encode(r, "renew"), Invalidate: encode(r, "invalidate"),
	}
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, view); err != nil { // only possible by a mistake in the template
		http.Error(w, "the page cannot be made: "+err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'")
	h.Set("Referrer-Policy", "no-referrer") // a path may carry the session id
	_, _ = w.Write(b.Bytes())
}

// clock returns a time for people, or a dash.
func clock(t time.Time) string {
	if t.IsZero() {
		return "–"
	}
	return t.UTC().Format("2006-01-02 15:04:05 MST")
}
