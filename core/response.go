package core

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"sync"
)

// bufferSize is how much of a body is held back, in bytes, so that the header
// stays editable.
const bufferSize = 8 << 10

// autoLength is the size up to which net/http counts short bodies itself.
const autoLength = 2048

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// errCommitting is what a hook gets that tries to send the header itself.
var errCommitting = errors.New("core: a commit hook cannot send the response")

// response is the one wrapper around the server's ResponseWriter. It defers the
// header and up to bufferSize bytes of the body until one of: more body, Flush,
// ReadFrom, Hijack, the end of the request. Then the exchange's hooks run, and
// then the header goes out. As with net/http it is for one goroutine at a time.
//
// Handlers see it as h1Writer or h2Writer, which differ in their methods.
type response struct {
	x *Exchange
	w http.ResponseWriter
	// h1 says that the connection can be hijacked.
	h1 bool
	// status is 0 until the handler has chosen one.
	status int
	// declared is the Content-Length at the time the status was chosen, or -1.
	declared int64
	// size counts the body bytes taken from the handler.
	size int64
	// buf holds the first n bytes that were not passed on; nil before the
	// first write.
	buf *[bufferSize]byte
	n   int
	// hooked: the hooks have run (or are running, if committing).
	hooked, committing bool
	// committed: the header has been passed on.
	committed, hijacked bool
	// failed is why the response was replaced by an error page; what the
	// handler writes after that is refused with it.
	failed error
}

func (r *response) init(x *Exchange, w http.ResponseWriter, req *http.Request) {
	r.x, r.w, r.declared = x, w, -1
	if req.ProtoMajor == 1 {
		_, r.h1 = w.(http.Hijacker)
	}
}

// writer returns the wrapper with the methods that the connection supports.
func (r *response) writer() http.ResponseWriter {
	if r.h1 {
		return (*h1Writer)(r)
	}
	return (*h2Writer)(r)
}

func (r *response) writeHeader(code int) {
	switch {
	case code < 100 || code > 999:
		panic("core: invalid WriteHeader code " + strconv.Itoa(code))
	case r.hijacked || r.committed || r.status != 0:
		return // as net/http, without its log line
	case code < 200 && code != http.StatusSwitchingProtocols:
		r.w.WriteHeader(code) // informational: nothing is committed
		return
	}
	r.status = code
	if cl := r.w.Header()["Content-Length"]; len(cl) > 0 {
		if v, err := strconv.ParseInt(cl[0], 10, 64); err == nil && v >= 0 {
			r.declared = v
		} else {
			r.w.Header().Del("Content-Length")
		}
	}
}

// bodyAllowed reports whether the chosen status may have a body.
func (r *response) bodyAllowed() bool {
	return r.status >= 200 && r.status != http.StatusNoContent && r.status != http.StatusNotModified
}

// admit decides whether n more bytes of body may be written.
func (r *response) admit(n int) error {
	switch {
	case r.hijacked:
		return http.ErrHijacked
	case r.failed != nil:
		return r.failed
	}
	if r.status == 0 {
		r.writeHeader(http.StatusOK)
	}
	if n == 0 {
		return nil
	}
	if !r.bodyAllowed() {
		return http.ErrBodyNotAllowed
	}
	if r.declared >= 0 && r.size+int64(n) > r.declared {
		return http.ErrContentLength
	}
	return nil
}

// put takes bytes of the body.
func put[T string | []byte](r *response, p T) (int, error) {
	if err := r.admit(len(p)); err != nil {
		return 0, err
	}
	if r.buf == nil {
		r.buf = buffers.Get().(*[bufferSize]byte)
	}
	if r.n+len(p) <= bufferSize {
		r.n += copy(r.buf[r.n:], p)
		r.size += int64(len(p))
		return len(p), nil
	}
	if err := r.commit(); err != nil {
		return 0, err
	}
	r.size += int64(len(p))
	held := 0
	if r.holdsBack() {
		held = 1
	}
	if err := r.push(r.n); err != nil {
		return 0, err
	}
	if len(p) <= bufferSize {
		r.n = copy(r.buf[:], p)
		return len(p), nil
	}
	n, err := r.w.Write([]byte(p[:len(p)-held]))
	if err == nil && held > 0 {
		r.n = copy(r.buf[:], p[n:])
		n += held
	}
	return n, err
}

// holdsBack reports whether the body is complete in the client's eyes although
// session changes may still come that have to be replicated first: then the
// last byte waits for the end of the request.
func (r *response) holdsBack() bool {
	return r.declared >= 0 && r.size >= r.declared && r.x.waits()
}

// push passes on the first n bytes of the buffer.
func (r *response) push(n int) error {
	if n == 0 {
		return nil
	}
	_, err := r.w.Write(r.buf[:n])
	r.n = copy(r.buf[:], r.buf[n:r.n])
	return err
}

// runHooks lets the exchange act before the header goes out. On an error the
// response has become an error page.
func (r *response) runHooks() error {
	if r.committing {
		return errCommitting
	}
	if r.hooked || r.failed != nil {
		return r.failed
	}
	r.hooked, r.committing = true, true
	err := r.x.beforeCommit()
	r.committing = false
	if err != nil {
		r.x.commitFailed(err)
	}
	return err
}

// commit runs the hooks and passes on the header, once.
func (r *response) commit() error {
	if r.committed {
		return nil
	}
	if err := r.runHooks(); err != nil {
		return err
	}
	r.sendHeader()
	return nil
}

func (r *response) sendHeader() {
	r.committed = true
	h := r.w.Header()
	declared := h["Trailer"]
	if declared == nil {
		r.w.WriteHeader(r.status)
		return
	}
	// Trailers may have been set already, because the header was deferred; they
	// must not go out with it.
	hidden := map[string][]string{}
	for _, line := range declared {
		for name := range strings.SplitSeq(line, ",") {
			name = http.CanonicalHeaderKey(textproto.TrimString(name))
			if v, ok := h[name]; ok {
				hidden[name] = v
				delete(h, name)
			}
		}
	}
	r.w.WriteHeader(r.status)
	for name, v := range hidden {
		h[name] = v
	}
}

// reset drops the body that the handler has written so far and makes the
// response one of that status. It is for use before the commit; the header is
// made anew by Exchange.replace.
func (r *response) reset(status int, why error) {
	r.status, r.declared, r.size, r.n = status, -1, 0, 0
	r.failed = why
}

// finish sends what is left. It is called once, after the handler.
func (r *response) finish() {
	if !r.committed {
		h := r.w.Header()
		if r.n > autoLength && r.declared < 0 && h["Content-Length"] == nil && h["Transfer-Encoding"] == nil && h["Trailer"] == nil {
			h["Content-Length"] = []string{strconv.Itoa(r.n)}
		}
		r.sendHeader()
	}
	_ = r.push(r.n) // the client has gone; net/http closes the connection
}

// release gives the buffer back.
func (r *response) release() {
	if r.buf != nil {
		buffers.Put(r.buf)
		r.buf, r.n = nil, 0
	}
}

func (r *response) flush() error {
	if err := r.admit(0); err != nil {
		return err
	}
	if err := r.commit(); err != nil {
		return err
	}
	n := r.n
	if n > 0 && r.holdsBack() {
		n--
	}
	if err := r.push(n); err != nil {
		return err
	}
	switch f := r.w.(type) {
	case interface{ FlushError() error }:
		return f.FlushError()
	case http.Flusher:
		f.Flush()
		return nil
	}
	return http.NewResponseController(r.w).Flush()
}

// readFrom keeps the server's way of copying a file to the connection without
// passing it through the process. Session changes that a handler makes after it
// are replicated at the end of the request, but the client may have the whole
// body by then if its length was declared.
func (r *response) readFrom(src io.Reader) (int64, error) {
	rf, ok := r.w.(io.ReaderFrom)
	if !ok {
		return io.Copy(struct{ io.Writer }{(*h1Writer)(r)}, src)
	}
	if err := r.admit(0); err != nil {
		return 0, err
	}
	if !r.bodyAllowed() {
		return 0, http.ErrBodyNotAllowed
	}
	if err := r.commit(); err != nil {
		return 0, err
	}
	if err := r.push(r.n); err != nil {
		return 0, err
	}
	n, err := rf.ReadFrom(src)
	r.size += n
	return n, err
}

func (r *response) hijack() (net.Conn, *bufio.ReadWriter, error) {
	if r.hijacked {
		return nil, nil, http.ErrHijacked
	}
	if r.failed != nil {
		return nil, nil, r.failed
	}
	if !r.committed {
		if err := r.runHooks(); err != nil {
			return nil, nil, err
		}
	}
	// A handler that has chosen a status wants the server to write the header;
	// others write one themselves.
	chosen := r.status != 0
	if chosen && !r.committed {
		r.sendHeader()
	}
	if err := r.push(r.n); err != nil {
		return nil, nil, err
	}
	conn, rw, err := r.w.(http.Hijacker).Hijack()
	if err != nil {
		return nil, nil, err
	}
	r.hijacked = true
	if !chosen {
		r.status = http.StatusSwitchingProtocols
		if cookies := r.w.Header()["Set-Cookie"]; len(cookies) > 0 {
			conn = &upgradeConn{Conn: conn, cookies: cookies}
			rw.Writer.Reset(conn)
		}
	}
	return conn, rw, nil
}

// upgradeConn puts the response's cookies into the 101 that a handler writes
// to the hijacked connection itself.
type upgradeConn struct {
	net.Conn
	mu      sync.Mutex
	cookies []string // guarded by mu; nil after the first write
}

// Write passes p on; the first one gets the cookies behind its status line.
func (c *upgradeConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	cookies := c.cookies
	c.cookies = nil
	c.mu.Unlock()
	end := bytes.Index(p, []byte("\r\n"))
	if len(cookies) == 0 || end < 0 || !bytes.HasPrefix(p, []byte("HTTP/1.1 101")) {
		return c.Conn.Write(p)
	}
	end += 2
	b := append(make([]byte, 0, len(p)+256), p[:end]...)
	for _, cookie := range cookies {
		b = append(append(append(b, "Set-Cookie: "...), cookie...), "\r\n"...)
	}
	added := len(b) - end
	n, err := c.Conn.Write(append(b, p[end:]...))
	if n > end { // report in the caller's bytes
		n = max(end, n-added)
	}
	return n, err
}

// h1Writer is the response on a connection that can be hijacked.
type h1Writer response

func (w *h1Writer) Header() http.Header               { return w.w.Header() }
func (w *h1Writer) WriteHeader(code int)              { (*response)(w).writeHeader(code) }
func (w *h1Writer) Write(p []byte) (int, error)       { return put((*response)(w), p) }
func (w *h1Writer) WriteString(s string) (int, error) { return put((*response)(w), s) }
func (w *h1Writer) Flush()                            { _ = (*response)(w).flush() }
func (w *h1Writer) FlushError() error                 { return (*response)(w).flush() }
func (w *h1Writer) Unwrap() http.ResponseWriter       { return w.w }

func (w *h1Writer) ReadFrom(src io.Reader) (int64, error) { return (*response)(w).readFrom(src) }

func (w *h1Writer) Hijack() (net.Conn, *bufio.ReadWriter, error) { return (*response)(w).hijack() }

// h2Writer is the response on any other connection.
type h2Writer response

func (w *h2Writer) Header() http.Header               { return w.w.Header() }
func (w *h2Writer) WriteHeader(code int)              { (*response)(w).writeHeader(code) }
func (w *h2Writer) Write(p []byte) (int, error)       { return put((*response)(w), p) }
func (w *h2Writer) WriteString(s string) (int, error) { return put((*response)(w), s) }
func (w *h2Writer) Flush()                            { _ = (*response)(w).flush() }
func (w *h2Writer) FlushError() error                 { return (*response)(w).flush() }
func (w *h2Writer) Unwrap() http.ResponseWriter       { return w.w }

var (
	_ http.Flusher    = (*h1Writer)(nil)
	_ http.Hijacker   = (*h1Writer)(nil)
	_ io.ReaderFrom   = (*h1Writer)(nil)
	_ io.StringWriter = (*h1Writer)(nil)
	_ http.Flusher    = (*h2Writer)(nil)
	_ io.StringWriter = (*h2Writer)(nil)
)
