package heartbeat

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"net/netip"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// A sealed heartbeat is a member record with a seal behind its end mark, where
// Tribes nodes look no more:
//
//	magic          4  "LHS1"
//	key            4  the id of the key
//	nonce          8  drawn by the sender, another one from time to time
//	asked count    1
//	asked        8·n  the first bytes of the ids of nodes that the sender asks
//	                  to prove that they are there now
//	echo count     1
//	echoes       8·n  the nonces of nodes that have asked the sender
//	mac           16  of the record and all before, HMAC with SHA-256
//
// The mac proves who made the record; that its alive time goes on, that it is
// newer than the last. Of a node that is no member neither shows that the record
// is not an old one, so it is asked to repeat our nonce. No clock is read for
// any of this, and among members nothing is asked or repeated.
const (
	sealMagic = "LHS1"
	word      = 8
	macSize   = 16
	sealHead  = len(sealMagic) + len(secret.KeyID{}) + word
	minSeal   = sealHead + 2 + macSize
	// maxWords is how many nodes are asked, and answered, in one heartbeat.
	maxWords = 100
	maxSeal  = minSeal + 2*maxWords*word
	// maxProofs bounds the nodes that are asked, and answered, at a time.
	maxProofs = 4096

	sealPurpose = "membership v1"
)

// Security says who may be a member.
type Security struct {
	// Secret is shared by all nodes and seals heartbeats; empty for none.
	Secret secret.Text
	// File is a file of secrets in its place: the first one seals, all are valid.
	File string
	// Old secrets are valid, too.
	Old []secret.Text
	// Unauthenticated are the addresses and networks whose nodes may be members
	// without a seal.
	Unauthenticated []string
}

// keys returns the keys, that which seals first; none without a secret.
func (s Security) keys() ([]secret.Key, error) {
	all, err := secret.List("secret", s.Secret, s.File, s.Old)
	if err == nil {
		err = secret.CheckLength("secret", all)
	}
	if err != nil {
		return nil, err
	}
	return secret.DeriveAll(all, sealPurpose)
}

func (s Security) networks() ([]netip.Prefix, error) {
	var out []netip.Prefix
	for i, text := range s.Unauthenticated {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			a, aerr := netip.ParseAddr(text)
			if aerr != nil {
				return nil, fmt.Errorf("unauthenticated[%d]: %q is neither an address nor a network like 10.0.0.0/24", i, text)
			}
			p = netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen())
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

// Validate reports what is wrong.
func (s Security) Validate() error {
	keys, err := s.keys()
	_, nerr := s.networks()
	if err == nil && len(keys) == 0 && len(s.Unauthenticated) > 0 {
		nerr = errors.Join(nerr, errors.New("unauthenticated: without a secret everybody is: leave it out, or set secret"))
	}
	return errors.Join(err, nerr)
}

// heard is a record that was received.
type heard struct {
	rec channel.Member
	// sealed: by a key of ours. The rest is zero otherwise.
	sealed bool
	nonce  [word]byte
	// asked and echoes are lists of words.
	asked, echoes []byte
}

// opener reads datagrams. One goroutine owns it.
type opener struct {
	ids  []secret.KeyID
	macs []hash.Hash
	sum  []byte
}

func newOpener(keys []secret.Key) (*opener, error) {
	o := &opener{}
	for _, k := range keys {
		m, err := newMAC(k)
		if err != nil {
			return nil, err
		}
		o.ids, o.macs = append(o.ids, k.ID), append(o.macs, m)
	}
	return o, nil
}

func newMAC(k secret.Key) (hash.Hash, error) {
	raw, err := k.Expand("mac", nil, secret.KeySize)
	if err != nil {
		return nil, err
	}
	return hmac.New(sha256.New, raw), nil
}

// open reads a datagram that must hold exactly one record, and maybe its seal.
// reason says why it does not. Without keys a seal is left alone. The result
// shares no memory with b.
func (o *opener) open(b []byte) (h heard, reason string) {
	if len(b) == 0 {
		return h, "empty"
	}
	rec, n, err := wire.DecodeMember(b)
	if err != nil {
		return h, wire.Reason(err)
	}
	h.rec = rec
	if n == len(b) {
		return h, ""
	}
	asked, echoes, ok := parseSeal(b[n:])
	if !ok {
		return heard{}, "trailing"
	}
	if len(o.macs) == 0 {
		return h, ""
	}
	seal := b[n:]
	for i, id := range o.ids {
		if string(id[:]) != string(seal[len(sealMagic):len(sealMagic)+len(id)]) {
			continue
		}
		mac := o.macs[i]
		mac.Reset()
		mac.Write(b[:len(b)-macSize])
		o.sum = mac.Sum(o.sum[:0])
		if !hmac.Equal(o.sum[:macSize], b[len(b)-macSize:]) {
			return heard{}, "forged"
		}
		h.sealed = true
		copy(h.nonce[:], seal[sealHead-word:])
		if len(asked) > 0 {
			h.asked = append([]byte(nil), asked...)
		}
		if len(echoes) > 0 {
			h.echoes = append([]byte(nil), echoes...)
		}
		return h, ""
	}
	return heard{}, "unknown_key"
}

// parseSeal finds the lists of a seal that is well formed.
func parseSeal(b []byte) (asked, echoes []byte, ok bool) {
	if len(b) < minSeal || string(b[:len(sealMagic)]) != sealMagic {
		return nil, nil, false
	}
	b = b[sealHead : len(b)-macSize]
	for _, list := range []*[]byte{&asked, &echoes} {
		if len(b) == 0 || len(b) < 1+int(b[0])*word {
			return nil, nil, false
		}
		n := 1 + int(b[0])*word
		*list, b = b[1:n], b[n:]
	}
	return asked, echoes, len(b) == 0
}

func hasWord(list []byte, w [word]byte) bool {
	for ; len(list) >= word; list = list[word:] {
		if [word]byte(list) == w {
			return true
		}
	}
	return false
}

// proofs seals heartbeats, and knows who has to prove what. The goroutine run
// owns it. now is an argument.
type proofs struct {
	key  secret.Key
	mac  hash.Hash
	sum  []byte
	open []netip.Prefix // whose nodes need no seal
	life time.Duration  // of a nonce, and of what is asked and owed

	nonce, last [word]byte // ours now, and the one before
	turned      time.Time  // when nonce was drawn
	asked, owed map[[word]byte]time.Time
}

func newProofs(keys []secret.Key, open []netip.Prefix, life time.Duration) (*proofs, error) {
	mac, err := newMAC(keys[0])
	if err != nil {
		return nil, err
	}
	return &proofs{
		key: keys[0], mac: mac, open: open, life: life,
		asked: map[[word]byte]time.Time{}, owed: map[[word]byte]time.Time{},
	}, nil
}

// wordOf is the part of an id that stands for it.
func wordOf(id channel.UniqueID) [word]byte { return [word]byte(id[:word]) }

// turn draws another nonce when it is time.
func (p *proofs) turn(now time.Time) {
	if !p.turned.IsZero() && now.Sub(p.turned) < p.life {
		return
	}
	p.last = p.nonce
	_, _ = rand.Read(p.nonce[:]) // never fails
	if p.turned.IsZero() {
		p.last = p.nonce
	}
	p.turned = now
}

// mayGoWithout reports whether the nodes at that address need no seal.
func (p *proofs) mayGoWithout(a netip.Addr) bool {
	for _, n := range p.open {
		if n.Contains(a.Unmap()) {
			return true
		}
	}
	return false
}

// fresh reports whether a sealed record was made just now, because it repeats
// our nonce.
func (p *proofs) fresh(h heard, now time.Time) bool {
	p.turn(now)
	return hasWord(h.echoes, p.nonce) || hasWord(h.echoes, p.last)
}

// ask has the next heartbeats ask for a proof.
func (p *proofs) ask(id channel.UniqueID, now time.Time) { note(p.asked, wordOf(id), now) }

// owe has the next heartbeats repeat a nonce.
func (p *proofs) owe(nonce [word]byte, now time.Time) { note(p.owed, nonce, now) }

func note(m map[[word]byte]time.Time, w [word]byte, now time.Time) {
	if _, ok := m[w]; ok || len(m) < maxProofs {
		m[w] = now
	}
}

// settle stops asking for a proof that has been given.
func (p *proofs) settle(id channel.UniqueID) { delete(p.asked, wordOf(id)) }

// seal appends the seal of the record that b holds.
func (p *proofs) seal(b []byte, now time.Time) []byte {
	p.turn(now)
	room := (maxDatagram - len(b) - minSeal) / 2 / word
	b = append(b, sealMagic...)
	b = append(b, p.key.ID[:]...)
	b = append(b, p.nonce[:]...)
	for _, m := range []map[[word]byte]time.Time{p.asked, p.owed} {
		count := len(b)
		b = append(b, 0)
		for w, at := range m { // in no order, so that all have their turn
			if now.Sub(at) > p.life {
				delete(m, w)
			} else if int(b[count]) < min(maxWords, room) {
				b = append(b, w[:]...)
				b[count]++
			}
		}
	}
	p.mac.Reset()
	p.mac.Write(b)
	p.sum = p.mac.Sum(p.sum[:0])
	return append(b, p.sum[:macSize]...)
}
