package bench

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"

	"github.com/longhouse-go/longhouse/channel"
)

// raw is no channel at all: a TCP connection for every sender and destination,
// with a length before each message. It is what the others are held against.
// With none and async a sender writes through a buffer of 64 KiB; with ack,
// sync-ack and the requests it waits for an answer of one byte, or of the whole
// message.
type raw struct {
	listener net.Listener
	box      inbox
	peers    []netip.AddrPort

	mu    sync.Mutex
	conns map[net.Conn]struct{} // guarded by mu
	wg    sync.WaitGroup
}

const (
	rawBuffer = 64 << 10
	rawHead   = 5 // length and what to answer
	rawMax    = 256 << 20
)

// What the receiver answers.
const (
	rawNothing = iota
	rawByte
	rawEcho
)

// ServeRaw runs an agent that is plain TCP, until in ends.
func ServeRaw(in io.Reader, out io.Writer) error {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	r := &raw{listener: l, conns: map[net.Conn]struct{}{}}
	r.wg.Go(r.accept)
	return serve(in, out, r)
}

func (r *raw) record() channel.Member {
	a := r.listener.Addr().(*net.TCPAddr).AddrPort()
	return channel.Member{ID: channel.NewUniqueID(), Host: a.Addr(), Port: int(a.Port()), SecurePort: -1, UDPPort: -1}
}

func (r *raw) join(m channel.Member) error {
	r.peers = append(r.peers, m.Addr())
	return nil
}

func (r *raw) received() *inbox { return &r.box }

func (r *raw) close() {
	r.listener.Close()
	r.mu.Lock()
	for c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.wg.Wait()
}

func (r *raw) accept() {
	for {
		c, err := r.listener.Accept()
		if err != nil {
			return
		}
		r.mu.Lock()
		r.conns[c] = struct{}{}
		r.mu.Unlock()
		r.wg.Go(func() {
			r.receive(c)
			c.Close()
			r.mu.Lock()
			delete(r.conns, c)
			r.mu.Unlock()
		})
	}
}

func (r *raw) receive(c net.Conn) {
	in := bufio.NewReaderSize(c, rawBuffer)
	var head [rawHead]byte
	var body []byte
	for {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint32(head[:]))
		if n > rawMax {
			return
		}
		if n > cap(body) {
			body = make([]byte, n)
		}
		if _, err := io.ReadFull(in, body[:n]); err != nil {
			return
		}
		r.box.add()
		var err error
		switch head[4] {
		case rawByte:
			_, err = c.Write(head[4:])
		case rawEcho:
			_, err = c.Write(body[:n])
		}
		if err != nil {
			return
		}
	}
}

func (r *raw) sender(option string, size int) (func() error, func(), error) {
	var answer byte
	switch option {
	case "ack", "sync-ack":
		answer = rawByte
	case "rpc", "echo":
		answer = rawEcho
	case "udp":
		return nil, nil, fmt.Errorf("raw: udp: %w", errOption)
	}
	var conns []net.Conn
	var outs []*bufio.Writer
	for _, p := range r.peers {
		c, err := net.Dial("tcp", p.String())
		if err != nil {
			return nil, nil, err
		}
		conns = append(conns, c)
		outs = append(outs, bufio.NewWriterSize(c, rawBuffer))
	}
	head := binary.BigEndian.AppendUint32(nil, uint32(size))
	head = append(head, answer)
	body := make([]byte, size)
	back := make([]byte, 1)
	if answer == rawEcho {
		back = make([]byte, size)
	}
	send := func() error {
		for _, w := range outs {
			if _, err := w.Write(head); err != nil {
				return err
			}
			if _, err := w.Write(body); err != nil {
				return err
			}
			if answer == rawNothing {
				continue
			}
			if err := w.Flush(); err != nil {
				return err
			}
		}
		if answer == rawNothing {
			return nil
		}
		for _, c := range conns {
			if _, err := io.ReadFull(c, back); err != nil {
				return err
			}
		}
		return nil
	}
	end := func() {
		for i, w := range outs {
			_ = w.Flush()
			_ = conns[i].(*net.TCPConn).CloseWrite()
			// The peer closes when it has read everything.
			_, _ = io.Copy(io.Discard, conns[i])
			conns[i].Close()
		}
	}
	return send, end, nil
}
