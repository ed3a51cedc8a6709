package conformance

import (
	"bytes"
	"context"
	"maps"
	"net/http"
	"slices"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// valveSaboteurs are wrong valves for one check.
func valveSaboteurs(check string) []Saboteur {
	wrap := func(f func(w http.ResponseWriter) http.ResponseWriter) core.ValveFunc {
		return func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(f(w), r) })
		}
	}
	wrong := map[string]map[string]core.ValveFunc{
		"transparent": {
			"adds a header": func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("X-Powered-By", "me")
					next.ServeHTTP(w, r)
				})
			},
			"hides a cookie from the application": func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					r.Header.Del("Cookie")
					next.ServeHTTP(w, r)
				})
			},
			"decodes the path": func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					r.RequestURI = r.URL.Path
					next.ServeHTTP(w, r)
				})
			},
			"swallows informational responses": wrap(func(w http.ResponseWriter) http.ResponseWriter { return &noInformation{unwrapping{w}} }),
			"swallows trailers":                wrap(func(w http.ResponseWriter) http.ResponseWriter { return &noTrailers{unwrapping{w}} }),
			"turns all errors into 200":        wrap(func(w http.ResponseWriter) http.ResponseWriter { return &alwaysFine{unwrapping{w}} }),
			"truncates large bodies":           wrap(func(w http.ResponseWriter) http.ResponseWriter { return &truncating{unwrapping: unwrapping{w}} }),
		},
		"controller": {
			"wraps the writer without Unwrap": wrap(func(w http.ResponseWriter) http.ResponseWriter { return hiding{w} }),
			"passes flushing only":            wrap(func(w http.ResponseWriter) http.ResponseWriter { return flushing{hiding{w}} }),
		},
		"streaming": {
			"sends the body when it is complete": func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					b := &buffering{unwrapping: unwrapping{w}, status: http.StatusOK}
					next.ServeHTTP(b, r)
					w.WriteHeader(b.status)
					_, _ = w.Write(b.body.Bytes())
				})
			},
			"ignores Flush": wrap(func(w http.ResponseWriter) http.ResponseWriter { return &deaf{unwrapping{w}} }),
		},
		"panic": {
			"answers 200 after a panic": recovering(func(w http.ResponseWriter, _ any) {}),
			"appends an error page to what is there": recovering(func(w http.ResponseWriter, _ any) {
				_, _ = w.Write([]byte("\n500 something went wrong"))
			}),
			"answers a second time": recovering(func(w http.ResponseWriter, _ any) {
				c, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					panic(http.ErrAbortHandler)
				}
				defer c.Close()
				_, _ = c.Write([]byte("\r\nHTTP/1.1 500 Internal Server Error\r\n\r\n"))
			}),
			"answers a request that is to be aborted": recovering(func(w http.ResponseWriter, p any) {
				if p != http.ErrAbortHandler {
					panic(p)
				}
				w.WriteHeader(http.StatusInternalServerError)
			}),
		},
		"cancel": {
			"detaches the context": func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					next.ServeHTTP(w, r.WithContext(context.WithoutCancel(r.Context())))
				})
			},
		},
	}[check]
	var list []Saboteur
	for _, name := range sortedKeys(wrong) {
		f := wrong[name]
		list = append(list, Saboteur{Name: name, New: func() Subject {
			return Valve("wrong", func(struct{}, channel.Settings) (core.Valve, error) { return f, nil }, struct{}{})
		}})
	}
	return list
}

// recovering is a valve that does something of its own after a panic.
func recovering(f func(w http.ResponseWriter, cause any)) core.ValveFunc {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			defer func() {
				if p := recover(); p != nil {
					f(w, p)
				}
			}()
			next.ServeHTTP(w, r)
		})
	}
}

// unwrapping is a wrapper as it should be.
type unwrapping struct{ http.ResponseWriter }

func (u unwrapping) Unwrap() http.ResponseWriter { return u.ResponseWriter }

type noInformation struct{ unwrapping }

func (w *noInformation) WriteHeader(status int) {
	if status >= 200 {
		w.unwrapping.WriteHeader(status)
	}
}

// noTrailers gives the application a header of its own once the real one is out.
type noTrailers struct{ unwrapping }

func (w *noTrailers) Write(b []byte) (int, error) {
	w.Header().Del("Trailer")
	return w.ResponseWriter.Write(b)
}

type alwaysFine struct{ unwrapping }

func (w *alwaysFine) WriteHeader(status int) {
	if status >= 400 {
		status = http.StatusOK
	}
	w.unwrapping.WriteHeader(status)
}

type truncating struct {
	unwrapping
	n int
}

func (w *truncating) Write(b []byte) (int, error) {
	const limit = 512 << 10
	keep := b[:min(len(b), max(0, limit-w.n))]
	w.n += len(b)
	if _, err := w.ResponseWriter.Write(keep); err != nil {
		return 0, err
	}
	return len(b), nil
}

// hiding has no method but those of http.ResponseWriter.
type hiding struct{ w http.ResponseWriter }

func (h hiding) Header() http.Header         { return h.w.Header() }
func (h hiding) Write(b []byte) (int, error) { return h.w.Write(b) }
func (h hiding) WriteHeader(status int)      { h.w.WriteHeader(status) }

type flushing struct{ hiding }

func (f flushing) FlushError() error { return http.NewResponseController(f.w).Flush() }

type buffering struct {
	unwrapping
	body   bytes.Buffer
	status int
}

func (b *buffering) Write(p []byte) (int, error) { return b.body.Write(p) }
func (b *buffering) WriteHeader(status int)      { b.status = status }
func (b *buffering) FlushError() error           { return nil }

type deaf struct{ unwrapping }

func (*deaf) FlushError() error { return nil }

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
