package demo

import (
	"errors"
	"net/http"

	"github.com/longhouse-go/longhouse/valves/singlesignon"
)

// login believes whoever says a name: this is a demonstration, and has nothing
// to protect.
func (a *app) login(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	a.signedOn(w, r, singlesignon.SignOn(r.Context(), singlesignon.Principal{Name: r.FormValue("user"), AuthType: "demo"}))
}

func (a *app) logout(w http.ResponseWriter, r *http.Request) {
	a.signedOn(w, r, singlesignon.SignOff(r.Context()))
}

func (a *app) signedOn(w http.ResponseWriter, r *http.Request, err error) {
	switch {
	case err == nil:
		a.back(w, r)
	case errors.Is(err, singlesignon.ErrPrincipal):
		http.Error(w, err.Error(), http.StatusBadRequest)
	case errors.Is(err, singlesignon.ErrNoValve):
		http.Error(w, err.Error(), http.StatusNotImplemented)
	default:
		refuse(w, err)
	}
}

func (a *app) whoami(w http.ResponseWriter, r *http.Request) {
	user, _, err := singlesignon.User(r.Context())
	if err != nil && !errors.Is(err, singlesignon.ErrNoValve) {
		refuse(w, err)
		return
	}
	text(w)
	_, _ = w.Write([]byte(user.Name))
}
