package demo

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// Bounds of what a client may store, in bytes, and of how many attributes the
// page's form adds.
const (
	maxBlob       = 1 << 20
	maxName       = 128
	maxValue      = 4 << 10
	maxForm       = 64 << 10
	maxAttributes = 64
)

// counter and blob are the attributes of /write and /read.
const counter = session.Attr[int64]("n")

const blobName = "blob"

// app is the application on one node.
type app struct {
	node string
	// blobs caches the encoded blob for the latest size asked for: encoding it
	// again for each request would be what /write measures.
	blobs atomic.Pointer[blob]
	bufs  sync.Pool
}

// blob is an encoded byte string of size zero bytes.
type blob struct {
	size    int
	encoded []byte
}

// Handler returns the application; node is the name to show.
//
//	GET  /            the session page
//	GET  /info        the session as JSON
//	POST /set         sets dataName to dataValue, then leads back to the page
//	GET  /plain       ok, without touching the session
//	GET  /read        attribute n
//	GET  /write       increments n, sets blob to ?size=100 bytes, answers n
//	POST /renew       gives the session a new id
//	POST /invalidate  ends the session
//	POST /login       signs user on, whoever that is, if the host has the valve singlesignon
//	POST /logout      signs off
//	GET  /whoami      who has signed on, or nothing
func Handler(node string) http.Handler {
	a := &app{node: node}
	a.bufs.New = func() any { return new([20]byte) }
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", a.page)
	mux.HandleFunc("GET /info", a.info)
	mux.HandleFunc("POST /set", a.set)
	mux.HandleFunc("GET /plain", a.plain)
	mux.HandleFunc("GET /read", a.read)
	mux.HandleFunc("GET /write", a.write)
	mux.HandleFunc("POST /renew", a.renew)
	mux.HandleFunc("POST /invalidate", a.invalidate)
	mux.HandleFunc("POST /login", a.login)
	mux.HandleFunc("POST /logout", a.logout)
	mux.HandleFunc("GET /whoami", a.whoami)
	return mux
}

// refuse answers an error of the session layer.
func refuse(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	switch {
	case errors.Is(err, session.ErrTooLarge):
		status = http.StatusRequestEntityTooLarge
	case errors.Is(err, session.ErrFull), errors.Is(err, session.ErrNone), errors.Is(err, session.ErrDraining):
		status = http.StatusServiceUnavailable
	case errors.Is(err, session.ErrInvalid):
		status = http.StatusConflict
	}
	http.Error(w, err.Error(), status)
}

func (a *app) plain(w http.ResponseWriter, _ *http.Request) {
	text(w)
	_, _ = w.Write(ok)
}

var (
	ok        = []byte("ok")
	plainType = []string{"text/plain; charset=utf-8"}
)

func text(w http.ResponseWriter) { w.Header()["Content-Type"] = plainType }

// number answers n.
func (a *app) number(w http.ResponseWriter, n int64) {
	text(w)
	buf := a.bufs.Get().(*[20]byte)
	_, _ = w.Write(strconv.AppendInt(buf[:0], n, 10))
	a.bufs.Put(buf)
}

func (a *app) read(w http.ResponseWriter, r *http.Request) {
	s, err := session.From(r)
	if err != nil {
		refuse(w, err)
		return
	}
	n, _, err := counter.Get(s)
	if err != nil {
		refuse(w, err)
		return
	}
	a.number(w, n)
}

func (a *app) write(w http.ResponseWriter, r *http.Request) {
	size := 100
	if r.URL.RawQuery != "" {
		if v := r.URL.Query().Get("size"); v != "" {
			var err error
			if size, err = strconv.Atoi(v); err != nil || size < 0 || size > maxBlob {
				http.Error(w, fmt.Sprintf("size must be a number of bytes between 0 and %d", maxBlob), http.StatusBadRequest)
				return
			}
		}
	}
	s, err := session.From(r)
	if err != nil {
		refuse(w, err)
		return
	}
	var n int64
	err = counter.Update(s, func(v *int64) error {
		*v++
		n = *v
		return nil
	})
	if err == nil {
		b := a.blobOf(size)
		err = s.Update(blobName, func([]byte) ([]byte, error) { return b.encoded, nil })
	}
	if err != nil {
		refuse(w, err)
		return
	}
	a.number(w, n)
}

// blobOf returns the encoded blob of that many bytes.
func (a *app) blobOf(size int) *blob {
	if b := a.blobs.Load(); b != nil && b.size == size {
		return b
	}
	encoded, err := session.Encode(make([]byte, size))
	if err != nil { // bytes can always be encoded
		panic("demo: " + err.Error())
	}
	b := &blob{size, encoded}
	a.blobs.Store(b)
	return b
}

// attribute is one line of the page.
type attribute struct{ Name, Value string }

// attributes returns the session's attributes in the form for people.
func attributes(s session.Session) ([]attribute, error) {
	var list []attribute
	for _, name := range s.Names() {
		var v any
		found, err := s.Get(name, &v)
		if err != nil {
			return nil, err
		}
		if found {
			list = append(list, attribute{name, show(v)})
		}
	}
	return list, nil
}

// show returns a value in a form for people.
func show(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case []byte:
		return fmt.Sprintf("(%d bytes)", len(v))
	}
	return fmt.Sprint(v)
}

func (a *app) info(w http.ResponseWriter, r *http.Request) {
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
	out := struct {
		Node       string            `json:"node"`
		ID         string            `json:"id"`
		IsNew      bool              `json:"isNew"`
		Attributes map[string]string `json:"attributes"`
	}{a.node, s.ID(), s.IsNew(), map[string]string{}}
	for _, at := range list {
		out.Attributes[at.Name] = at.Value
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(out)
}

func (a *app) set(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if err := r.ParseForm(); err != nil {
		http.Error(w, "the form cannot be read: "+err.Error(), http.StatusBadRequest)
		return
	}
	name, value := r.Form.Get("dataName"), r.Form.Get("dataValue")
	if name == "" || len(name) > maxName || len(value) > maxValue {
		http.Error(w, fmt.Sprintf("dataName must have 1 to %d bytes and dataValue at most %d", maxName, maxValue), http.StatusBadRequest)
		return
	}
	s, err := session.From(r)
	if err != nil {
		refuse(w, err)
		return
	}
	if names := s.Names(); len(names) >= maxAttributes {
		if set, _ := s.Get(name, new(any)); !set {
			http.Error(w, fmt.Sprintf("the session has %d attributes already; invalidate it to start again", len(names)), http.StatusRequestEntityTooLarge)
			return
		}
	}
	if err := s.Set(name, value); err != nil {
		refuse(w, err)
		return
	}
	a.back(w, r)
}

func (a *app) renew(w http.ResponseWriter, r *http.Request) {
	s, err := session.From(r)
	if err == nil {
		err = s.Renew()
	}
	if err != nil {
		refuse(w, err)
		return
	}
	a.back(w, r)
}

func (a *app) invalidate(w http.ResponseWriter, r *http.Request) {
	s, err := session.Existing(r)
	if err == nil && s != nil {
		err = s.Invalidate()
	}
	if err != nil {
		refuse(w, err)
		return
	}
	a.back(w, r)
}

// encode is for links to the application's own pages, relative to the page: they
// work under any context path, and without cookies.
func encode(r *http.Request, ref string) string {
	if x := core.FromContext(r.Context()); x != nil {
		return x.EncodeURL(ref)
	}
	return ref
}

// back leads to the page, so that a reload does not repeat the POST.
func (a *app) back(w http.ResponseWriter, r *http.Request) {
	// Not http.Redirect: it would make the reference absolute without knowing
	// the context path.
	w.Header().Set("Location", encode(r, "./"))
	w.WriteHeader(http.StatusSeeOther)
}
