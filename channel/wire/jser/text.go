package jser

import (
	"encoding/binary"
	"unicode/utf8"
	"unsafe"
)

// decodeText turns modified UTF-8 into UTF-8: U+0000 has two bytes, characters
// beyond U+FFFF are two surrogates of three bytes each. A surrogate without its
// partner, which UTF-8 cannot say, keeps its three bytes.
func decodeText(b []byte) (string, bool) {
	for i := 0; ; i++ {
		if i == len(b) {
			return own(append(make([]byte, 0, len(b)), b...)), true
		}
		if b[i] >= 0x80 {
			break
		}
	}
	out := make([]byte, 0, len(b))
	for len(b) > 0 {
		u, n := unit(b)
		if n == 0 {
			return "", false
		}
		if u >= 0xd800 && u < 0xdc00 {
			if low, m := unit(b[n:]); m == 3 && low >= 0xdc00 && low < 0xe000 {
				out = utf8.AppendRune(out, 0x10000+(rune(u)-0xd800)<<10+(rune(low)-0xdc00))
				b = b[n+m:]
				continue
			}
		}
		if u >= 0xd800 && u < 0xe000 {
			out = append(out, b[:n]...)
		} else {
			out = utf8.AppendRune(out, rune(u))
		}
		b = b[n:]
	}
	return own(out), true
}

// own makes a string of b, which is given away: every string has a place in
// memory of its own, also one of a single byte, which string(b) would share.
func own(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// unit reads one UTF-16 unit of modified UTF-8 and says how many bytes it took;
// 0 if they are none. Longer forms than needed are accepted, as by Java.
func unit(b []byte) (u uint16, n int) {
	switch {
	case len(b) == 0:
	case b[0] < 0x80:
		return uint16(b[0]), 1
	case b[0]>>5 == 6:
		if len(b) >= 2 && b[1]>>6 == 2 {
			return uint16(b[0]&31)<<6 | uint16(b[1]&63), 2
		}
	case b[0]>>4 == 14:
		if len(b) >= 3 && b[1]>>6 == 2 && b[2]>>6 == 2 {
			return uint16(b[0]&15)<<12 | uint16(b[1]&63)<<6 | uint16(b[2]&63), 3
		}
	}
	return 0, 0
}

// textSize returns how many bytes appendText appends for s; ok is false if s is
// neither UTF-8 nor what decodeText makes of surrogates.
func textSize(s string) (n int, ok bool) {
	for len(s) > 0 {
		r, w := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && w == 1:
			if !surrogate(s) {
				return 0, false
			}
			n, w = n+3, 3
		case r == 0:
			n += 2
		case w == 4:
			n += 6
		default:
			n += w
		}
		s = s[w:]
	}
	return n, true
}

func surrogate(s string) bool {
	return len(s) >= 3 && s[0] == 0xed && s[1] >= 0xa0 && s[1] <= 0xbf && s[2]>>6 == 2
}

// appendText appends s in modified UTF-8; textSize has approved of it.
func appendText(dst []byte, s string) []byte {
	for len(s) > 0 {
		r, w := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && w == 1:
			w = 3
			dst = append(dst, s[:3]...)
		case r == 0:
			dst = append(dst, 0xc0, 0x80)
		case w == 4:
			r -= 0x10000
			dst = appendSurrogate(dst, 0xd800+r>>10)
			dst = appendSurrogate(dst, 0xdc00+r&0x3ff)
		default:
			dst = append(dst, s[:w]...)
		}
		s = s[w:]
	}
	return dst
}

func appendSurrogate(dst []byte, u rune) []byte {
	return append(dst, 0xe0|byte(u>>12), 0x80|byte(u>>6)&0xbf, 0x80|byte(u)&0xbf)
}

func be16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }
func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }
func be64(b []byte) uint64 { return binary.BigEndian.Uint64(b) }
