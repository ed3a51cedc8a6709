// Package admin is the HTTP interface for operators, on a listener of its own
// that is meant for this machine only:
//
//	GET  /healthz      200 as long as the process serves
//	GET  /readyz       200, or 503 with one reason per line
//	GET  /metrics      Prometheus, names start with longhouse_
//	GET  /v1/members   [{"name","address","id","domain","aliveSeconds","local"}], this node first
//	GET  /v1/stack     the channel's layers and what they promise
//	GET  /v1/plugins   [core.PluginStatus]
//	GET  /v1/sessions  the session tables; ?limit=N sessions are listed (default 100, at most 10,000)
//	GET  /v1/attributes  the attributes of the contexts, without their values; ?limit=N as above
//	GET  /v1/config    the configuration as YAML, or as JSON if the request accepts that; secrets are ***
//	POST /v1/reload    reads the configuration again: {"reloaded":true}, or 422 and {"error":"…"}
//	POST /v1/drain     takes the node out of service, answers with the proof that all its sessions are elsewhere,
//	                   and then the process ends (also POST /drain); GET is the report so far; ?limit=N as above
//	GET  /debug/pprof/ profiles for go tool pprof
//
// There is no log-in. Requests whose Host is a foreign name and requests that a
// browser sends for another site are refused, so that no web page can reach the
// interface through a user's browser (DNS rebinding, cross-site requests).
//
// It imports core, core/config and channel, and is the only package that knows
// Prometheus; it must not import interceptors, valves, plugins, fx or the
// container.
package admin
