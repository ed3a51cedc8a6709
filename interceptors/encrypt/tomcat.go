package encrypt

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/secret"
)

// An encrypted body of the dialects of Tomcat is an initialisation vector, and
// the encryption of the time of the message (8 bytes, milliseconds, big endian;
// not up to 10.1.55) and the original body. GCM has a vector of 12 random bytes,
// no associated data, and a tag of 16 bytes at the end; CBC, CFB and OFB have a
// vector of 16 and PKCS5 padding.
const (
	stampSize = 8
	blockSize = aes.BlockSize
	gcmNonce  = 12
)

// mode is how blocks are chained.
type mode uint8

const (
	modeGCM mode = iota + 1
	modeCBC
	modeCFB
	modeOFB
)

var modeNames = map[mode]string{
	modeGCM: "AES/GCM/NoPadding", modeCBC: "AES/CBC/PKCS5Padding", modeCFB: "AES/CFB/PKCS5Padding", modeOFB: "AES/OFB/PKCS5Padding",
}

func (a mode) String() string { return modeNames[a] }

// aead reports whether the mode notices changes.
func (a mode) aead() bool { return a == modeGCM }

func (a mode) ivSize() int {
	if a == modeGCM {
		return gcmNonce
	}
	return blockSize
}

// parseAlgorithm takes the names that Tomcat's EncryptInterceptor takes, with
// its defaults: a name without mode and padding is AES/CBC/PKCS5Padding. Case
// does not matter, as in Java.
func parseAlgorithm(name string) (mode, error) {
	parts := strings.Split(strings.ToUpper(name), "/")
	if parts[0] != "AES" {
		return 0, fmt.Errorf("%q is no AES cipher", name)
	}
	if len(parts) == 1 {
		return modeCBC, nil
	}
	if len(parts) != 3 {
		return 0, fmt.Errorf("%q is not of the form AES/mode/padding", name)
	}
	m, padding := parts[1], parts[2]
	if padding != "NOPADDING" && padding != "PKCS5PADDING" {
		return 0, fmt.Errorf("%q: padding %s is not supported", name, padding)
	}
	switch m {
	case "GCM":
		if padding != "NOPADDING" {
			return 0, fmt.Errorf("%q: GCM takes no padding: write AES/GCM/NoPadding", name)
		}
		return modeGCM, nil
	case "CBC", "CFB", "OFB":
		if padding != "PKCS5PADDING" {
			return 0, fmt.Errorf("%q: %s without padding cannot encrypt bodies of any length: write AES/%s/PKCS5Padding", name, m, m)
		}
		return map[string]mode{"CBC": modeCBC, "CFB": modeCFB, "OFB": modeOFB}[m], nil
	case "NONE", "ECB", "PCBC", "CTS", "KW", "KWP", "CTR", "CCM":
		return 0, fmt.Errorf("%q: the mode %s is refused, as by Tomcat: write AES/GCM/NoPadding", name, m)
	}
	if strings.HasPrefix(m, "CFB") || strings.HasPrefix(m, "OFB") {
		return 0, fmt.Errorf("%q: %s with a size is refused, as by Tomcat: write AES/%s/PKCS5Padding", name, m[:3], m[:3])
	}
	return 0, fmt.Errorf("%q: the mode %s is not known", name, m)
}

// rawKeys reads keys as Tomcat does: hexadecimal, 16, 24 or 32 bytes.
func rawKeys(texts []secret.Text) ([][]byte, error) {
	var keys [][]byte
	for i, t := range texts {
		k, err := hex.DecodeString(strings.TrimSpace(t.Reveal()))
		if err != nil { // its error would show a part of the key
			return nil, fmt.Errorf("key: number %d is not hexadecimal, as it has to be for Tomcat", i+1)
		}
		if n := len(k); n != 16 && n != 24 && n != 32 {
			return nil, fmt.Errorf("key: number %d has %d bytes, AES takes 16, 24 or 32 (32, 48 or 64 hexadecimal digits)", i+1, n)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// tomcat is the dialects of Tomcat.
type tomcat struct {
	mode    mode
	stamped bool // the plaintext begins with a time
	blocks  []cipher.Block
	gcms    []cipher.AEAD
	seen    vectors
}

func newTomcat(c Config, texts []secret.Text) (*tomcat, error) {
	keys, err := rawKeys(texts)
	if err != nil {
		return nil, err
	}
	d := &tomcat{stamped: c.Dialect != DialectTomcat55}
	if d.mode, err = parseAlgorithm(c.algorithm()); err != nil {
		return nil, err
	}
	for _, k := range keys {
		b, err := aes.NewCipher(k)
		if err != nil {
			return nil, errors.New("key: AES does not take it") // never the key
		}
		g, err := cipher.NewGCM(b)
		if err != nil {
			return nil, err
		}
		d.blocks, d.gcms = append(d.blocks, b), append(d.gcms, g)
	}
	d.seen.window, d.seen.limit = c.ReplayTime.Milliseconds(), c.ReplayMessages
	return d, nil
}

func (d *tomcat) start(channel.Member) error { return nil }
func (d *tomcat) stop()                      {}

// silent: where nothing but the padding shows that a body is genuine, an answer
// that depends on the padding would let a forger decrypt.
func (d *tomcat) silent() bool { return !d.mode.aead() }

func (d *tomcat) seal(dst []byte, _ *sealed, _ channel.Link, m *channel.Message) ([]byte, error) {
	iv := d.mode.ivSize()
	need := iv + stampSize + len(m.Body) + blockSize // the tag, or the longest padding
	if cap(dst) < need {
		dst = make([]byte, 0, need+need/4)
	}
	dst = dst[:iv]
	if _, err := rand.Read(dst); err != nil {
		return dst, fmt.Errorf("randomness: %w", err)
	}
	if d.stamped {
		dst = binary.BigEndian.AppendUint64(dst, uint64(m.Time))
	}
	dst = append(dst, m.Body...)
	if d.mode == modeGCM {
		return d.gcms[0].Seal(dst[:iv], dst[:iv], dst[iv:], nil), nil
	}
	pad := blockSize - (len(dst)-iv)%blockSize
	for range pad {
		dst = append(dst, byte(pad))
	}
	d.mode.encrypt(d.blocks[0], dst[:iv], dst[iv:])
	return dst, nil
}

func (d *tomcat) open(_ channel.Link, m *channel.Message) reason {
	iv := d.mode.ivSize()
	least := iv + blockSize // a padded block, or a tag
	if d.stamped && d.mode.aead() {
		least += stampSize
	}
	if len(m.Body) < least {
		return truncated
	}
	if !d.mode.aead() && (len(m.Body)-iv)%blockSize != 0 {
		return truncated
	}
	if len(d.blocks) == 1 {
		text, r := d.decrypt(0, m, m.Body)
		if r == "" {
			m.Body = text
		}
		return r
	}
	s := sealedPool.Get().(*sealed) // a key that does not fit destroys what it is tried on
	defer s.release()
	worst := forged
	for i := range d.blocks {
		s.buf = append(s.buf[:0], m.Body...)
		text, r := d.decrypt(i, m, s.buf)
		switch r {
		case "":
			m.Body = append(m.Body[:0], text...)
			return ""
		case forged:
		case wrongTime:
			worst = r // maybe of another key: without a tag the padding fits by chance
		default:
			return r
		}
	}
	return worst
}

// decrypt decrypts b, which is m's body or a copy of it, in place with one key,
// and takes over the time of m.
func (d *tomcat) decrypt(key int, m *channel.Message, b []byte) (text []byte, r reason) {
	iv, text := b[:d.mode.ivSize()], b[d.mode.ivSize():]
	var vector [blockSize]byte
	copy(vector[:], iv)
	if d.mode.aead() {
		var err error
		if text, err = d.gcms[key].Open(text[:0], iv, text, nil); err != nil {
			return nil, forged
		}
	} else {
		d.mode.decrypt(d.blocks[key], iv, text)
		pad, ok := padding(text)
		if !ok {
			return nil, forged
		}
		text = text[:len(text)-pad]
	}
	if !d.stamped {
		return text, ""
	}
	if len(text) < stampSize {
		return nil, forged
	}
	stamp := int64(binary.BigEndian.Uint64(text))
	if r := d.seen.mark(vector, stamp, time.Now().UnixMilli()); r != "" {
		return nil, r
	}
	m.Time = stamp
	return text[stampSize:], ""
}

// padding returns the length of the PKCS5 padding of b, without telling by its
// time where it is wrong.
func padding(b []byte) (n int, ok bool) {
	n = int(b[len(b)-1])
	good := subtle.ConstantTimeLessOrEq(1, n) & subtle.ConstantTimeLessOrEq(n, blockSize)
	for i := 1; i <= blockSize; i++ {
		inside := subtle.ConstantTimeLessOrEq(i, n)
		good &= subtle.ConstantTimeSelect(inside, subtle.ConstantTimeByteEq(b[len(b)-i], byte(n)), 1)
	}
	return n, good == 1
}

// encrypt and decrypt change b, whole blocks, in place.
func (a mode) encrypt(block cipher.Block, iv, b []byte) {
	if a == modeCBC {
		cipher.NewCBCEncrypter(block, iv).CryptBlocks(b, b)
		return
	}
	var key [blockSize]byte
	prev := iv
	for ; len(b) > 0; b = b[blockSize:] {
		block.Encrypt(key[:], prev)
		subtle.XORBytes(b, b[:blockSize], key[:])
		if prev = b[:blockSize]; a == modeOFB {
			prev = key[:]
		}
	}
}

func (a mode) decrypt(block cipher.Block, iv, b []byte) {
	switch a {
	case modeCBC:
		cipher.NewCBCDecrypter(block, iv).CryptBlocks(b, b)
	case modeOFB:
		a.encrypt(block, iv, b)
	case modeCFB:
		var key, prev [blockSize]byte
		copy(prev[:], iv)
		for ; len(b) > 0; b = b[blockSize:] {
			block.Encrypt(key[:], prev[:])
			copy(prev[:], b)
			subtle.XORBytes(b, b[:blockSize], key[:])
		}
	}
}

// vectors remembers the initialisation vectors of the last messages. The time
// of a message is authentic only in GCM, and its sender never, so that there is
// one memory for all senders, and messages outside of a window of time around
// this node's clock are refused, as by Tomcat.
type vectors struct {
	window int64 // in ms
	limit  int

	mu    sync.Mutex
	known map[[blockSize]byte]struct{}
	queue []stampedVector // a heap, oldest first
	floor int64           // everything up to that time is refused
	any   bool            // floor is set
}

type stampedVector struct {
	stamp  int64
	vector [blockSize]byte
}

// mark notes a vector, or says why its message must not be taken. now is in
// milliseconds since 1970.
func (v *vectors) mark(vector [blockSize]byte, stamp, now int64) reason {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.known == nil {
		v.known = map[[blockSize]byte]struct{}{}
	}
	if stamp < now-v.window || stamp > now+v.window {
		return wrongTime
	}
	if _, dup := v.known[vector]; dup {
		return replayed
	}
	if v.any && stamp <= v.floor {
		return tooOld
	}
	for len(v.queue) > 0 && v.queue[0].stamp < now-v.window {
		delete(v.known, v.pop().vector) // its time alone gets it refused
	}
	v.push(stampedVector{stamp, vector})
	v.known[vector] = struct{}{}
	for len(v.queue) > v.limit {
		old := v.pop()
		delete(v.known, old.vector)
		v.floor, v.any = max(v.floor, old.stamp), true
	}
	return ""
}

func (v *vectors) push(s stampedVector) {
	v.queue = append(v.queue, s)
	q := v.queue
	for i := len(q) - 1; i > 0; {
		parent := (i - 1) / 2
		if q[parent].stamp <= q[i].stamp {
			return
		}
		q[parent], q[i] = q[i], q[parent]
		i = parent
	}
}

func (v *vectors) pop() stampedVector {
	q := v.queue
	top := q[0]
	last := len(q) - 1
	q[0] = q[last]
	q = q[:last]
	v.queue = q
	for i := 0; ; {
		child := 2*i + 1
		if child >= len(q) {
			return top
		}
		if child+1 < len(q) && q[child+1].stamp < q[child].stamp {
			child++
		}
		if q[i].stamp <= q[child].stamp {
			return top
		}
		q[i], q[child] = q[child], q[i]
		i = child
	}
}
