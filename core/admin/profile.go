package admin

import (
	"fmt"
	"net/http"
	"runtime"
	"runtime/pprof"
	"runtime/trace"
	"strconv"
	"time"

	"github.com/longhouse-go/longhouse/channel"
)

// maxProfile bounds the duration of a profile; it is less than writeTimeout.
const maxProfile = time.Minute

// profiles serves what net/http/pprof serves. That package is not used, because
// importing it adds its handlers to http.DefaultServeMux, which an application
// may well show to the world.
func profiles(mux *http.ServeMux) {
	mux.HandleFunc("GET /debug/pprof/{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		for _, p := range pprof.Profiles() {
			fmt.Fprintf(w, "%s %d\n", p.Name(), p.Count())
		}
		fmt.Fprint(w, "profile?seconds=30\ntrace?seconds=1\n")
	})
	mux.HandleFunc("GET /debug/pprof/{name}", lookup)
	mux.HandleFunc("GET /debug/pprof/profile", timed(30*time.Second, func(w http.ResponseWriter) (func(), error) {
		return pprof.StopCPUProfile, pprof.StartCPUProfile(w)
	}))
	mux.HandleFunc("GET /debug/pprof/trace", timed(time.Second, func(w http.ResponseWriter) (func(), error) {
		return trace.Stop, trace.Start(w)
	}))
}

// lookup writes a profile of the present state.
func lookup(w http.ResponseWriter, r *http.Request) {
	p := pprof.Lookup(r.PathValue("name"))
	if p == nil {
		http.Error(w, "unknown profile; see /debug/pprof/", http.StatusNotFound)
		return
	}
	debug, _ := strconv.Atoi(r.FormValue("debug")) // no number is 0
	if r.FormValue("gc") != "" && p.Name() == "heap" {
		runtime.GC()
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if debug > 0 {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	}
	_ = p.WriteTo(w, debug) // the client has gone
}

// timed records for as long as the request says.
func timed(usual time.Duration, start func(http.ResponseWriter) (stop func(), err error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		d := usual
		if text := r.FormValue("seconds"); text != "" {
			s, err := strconv.ParseFloat(text, 64)
			if err != nil || !(s > 0) || s > maxProfile.Seconds() {
				http.Error(w, fmt.Sprintf("seconds must be a number above 0, at most %v", maxProfile.Seconds()), http.StatusBadRequest)
				return
			}
			d = time.Duration(s * float64(time.Second))
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		stop, err := start(w)
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		defer stop()
		channel.Pause(r.Context(), d)
	}
}
