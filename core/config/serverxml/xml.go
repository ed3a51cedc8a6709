package serverxml

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/longhouse-go/longhouse/core/config"
)

// Bounds of a file, far above honest ones.
const (
	maxDepth    = 32
	maxElements = 10_000
	maxAttrs    = 200
	maxValue    = 64 << 10 // bytes of an attribute or text
)

// element is one XML element with its place. Elements and attributes are
// written in some letter case; lower has the name without it.
type element struct {
	name, lower string
	attrs       []attr
	children    []*element
	text        string
	pos         config.Pos
}

type attr struct {
	name, value string
	pos         config.Pos
}

// parse reads the file's only element. External entities are never read, and
// entity declarations are refused: nothing here needs them.
func parse(file string, data []byte) (*element, error) {
	fail := func(line int, format string, args ...any) error {
		return config.Problems{{Pos: config.Pos{File: file, Line: line}, Severity: config.Error, What: fmt.Sprintf(format, args...)}}
	}
	if len(data) > config.MaxFile {
		return nil, fail(1, "the file has %d bytes, more than the bound of %d", len(data), config.MaxFile)
	}
	data = toUTF8(bytes.TrimPrefix(data, []byte("\xef\xbb\xbf")))
	d := xml.NewDecoder(bytes.NewReader(data))
	d.CharsetReader = func(charset string, r io.Reader) (io.Reader, error) {
		if latin1(charset) { // toUTF8 has done it
			return r, nil
		}
		return nil, fmt.Errorf("the encoding %s is not supported; save the file as UTF-8", charset)
	}
	lines := lineIndex(data)
	var root *element
	var open []*element
	count := 0
	for {
		start := d.InputOffset()
		line := lines.at(start)
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			var se *xml.SyntaxError
			if errors.As(err, &se) {
				return nil, fail(se.Line, "not well-formed XML: %s", se.Msg)
			}
			return nil, fail(line, "not well-formed XML: %v", err)
		}
		switch t := t.(type) {
		case xml.Directive:
			if bytes.ContainsAny(t, "[") || bytes.Contains(bytes.ToUpper(t), []byte("ENTITY")) {
				return nil, fail(line, "declares XML entities, which are not read: put what they stand for into the file")
			}
		case xml.StartElement:
			count++
			switch {
			case count > maxElements:
				return nil, fail(line, "more than %d elements", maxElements)
			case len(open) >= maxDepth:
				return nil, fail(line, "elements are nested more than %d levels deep", maxDepth)
			case len(t.Attr) > maxAttrs:
				return nil, fail(line, "more than %d attributes", maxAttrs)
			case root != nil && len(open) == 0:
				return nil, fail(line, "a second outermost element <%s>", t.Name.Local)
			}
			e := &element{name: t.Name.Local, lower: strings.ToLower(t.Name.Local), pos: config.Pos{File: file, Line: line}}
			offsets := attrOffsets(data[start:d.InputOffset()])
			for i, a := range t.Attr {
				if len(a.Value) > maxValue {
					return nil, fail(line, "an attribute of more than %d bytes", maxValue)
				}
				if a.Name.Space != "" || a.Name.Local == "xmlns" {
					continue // xsi:schemaLocation and the like
				}
				at := line
				if i < len(offsets) {
					at = lines.at(start + int64(offsets[i]))
				}
				e.attrs = append(e.attrs, attr{a.Name.Local, a.Value, config.Pos{File: file, Line: at}})
			}
			if len(open) > 0 {
				parent := open[len(open)-1]
				parent.children = append(parent.children, e)
			} else {
				root = e
			}
			open = append(open, e)
		case xml.EndElement:
			open = open[:len(open)-1]
		case xml.CharData:
			if len(open) > 0 {
				e := open[len(open)-1]
				if len(e.text)+len(t) > maxValue {
					return nil, fail(line, "a text of more than %d bytes", maxValue)
				}
				e.text += string(t)
			}
		}
	}
	if root == nil {
		return nil, fail(1, "the file has no element")
	}
	return root, nil
}

// attrOffsets returns where the names of the attributes of a start tag begin.
func attrOffsets(tag []byte) []int {
	var offsets []int
	space := func(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }
	i := 1
	for i < len(tag) && !space(tag[i]) {
		i++
	}
	for {
		for i < len(tag) && space(tag[i]) {
			i++
		}
		if i >= len(tag) || tag[i] == '/' || tag[i] == '>' {
			return offsets
		}
		offsets = append(offsets, i)
		for i < len(tag) && tag[i] != '"' && tag[i] != '\'' {
			i++
		}
		if i >= len(tag) {
			return offsets
		}
		quote := tag[i]
		for i++; i < len(tag) && tag[i] != quote; i++ {
		}
		i++
	}
}

// lineStarts are the offsets at which lines begin.
type lineStarts []int64

func lineIndex(data []byte) lineStarts {
	starts := lineStarts{0}
	for i, c := range data {
		if c == '\n' {
			starts = append(starts, int64(i)+1)
		}
	}
	return starts
}

// at returns the line of an offset, counted from 1.
func (s lineStarts) at(offset int64) int {
	lo, hi := 0, len(s)
	for hi-lo > 1 {
		if mid := (lo + hi) / 2; s[mid] <= offset {
			lo = mid
		} else {
			hi = mid
		}
	}
	return lo + 1
}

func latin1(charset string) bool {
	switch strings.ToLower(charset) {
	case "iso-8859-1", "latin1", "us-ascii", "ascii":
		return true
	}
	return false
}

// toUTF8 converts a file that declares a Latin 1 encoding.
func toUTF8(data []byte) []byte {
	decl, _, ok := bytes.Cut(data, []byte("?>"))
	if !ok || !bytes.HasPrefix(decl, []byte("<?xml")) {
		return data
	}
	_, enc, ok := strings.Cut(string(decl), "encoding=")
	if !ok || len(enc) < 2 {
		return data
	}
	name, _, _ := strings.Cut(enc[1:], enc[:1])
	if !latin1(name) {
		return data
	}
	out := make([]rune, len(data))
	for i, c := range data {
		out[i] = rune(c)
	}
	return []byte(string(out))
}
