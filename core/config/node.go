package config

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// The bounds of a configuration file. They are far above any honest file and
// keep a hostile one from costing time or memory.
const (
	// MaxFile is the size of the biggest file that is read, in bytes.
	MaxFile = 1 << 20
	// maxTokens bounds the parser's work, maxDepth its recursion.
	maxTokens = 200_000
	maxDepth  = 64
	// maxNodes bounds the values after aliases have been expanded.
	maxNodes = 100_000
	// maxProblems ends the search: more findings help nobody.
	maxProblems = 100
)

// kind is the type of a YAML value.
type kind uint8

const (
	nullKind kind = iota
	stringKind
	intKind
	floatKind
	boolKind
	mapKind
	listKind
)

func (k kind) String() string {
	return [...]string{"nothing", "text", "a whole number", "a number", "true or false", "a mapping", "a list"}[k]
}

// node is one value of a file, with its place. Nodes are immutable once the
// file has been read; aliases share them.
type node struct {
	kind kind
	// text is a scalar as written, without quotes. A whole number is kept in
	// decimal in number, because it may be written as 0x10.
	text   string
	number string
	// quoted text is text whatever it looks like.
	quoted bool
	// secret marks a reference that has been resolved: never shown, never
	// resolved again.
	secret bool
	pairs  []pair
	items  []*node
	// size counts the values below, with aliases expanded, and this one.
	size int

	src       *source
	line, col int
}

// pair is one entry of a mapping.
type pair struct {
	key       string
	line, col int
	value     *node
}

func (n *node) pos() Pos {
	switch {
	case n == nil || n.src == nil:
		return Pos{}
	case n.line == 0:
		return Pos{File: n.src.file}
	}
	return n.src.pos(n.line, n.col)
}

// source is the text that nodes came from.
type source struct {
	file string
	// base is added to line numbers: the text may be a part of a file.
	base  int
	lines []string
}

func newSource(file string, base int, data []byte) *source {
	return &source{file: file, base: base, lines: strings.Split(string(data), "\n")}
}

func (s *source) pos(line, col int) Pos { return Pos{File: s.file, Line: line + s.base, Col: col} }

// excerpt returns a line for people to see.
func (s *source) excerpt(line int) string {
	if s == nil || line < 1 || line > len(s.lines) {
		return ""
	}
	l := strings.TrimRight(s.lines[line-1], "\r \t")
	if len(l) > maxExcerpt || strings.Contains(l, secretTag) {
		return ""
	}
	return l
}

// maxExcerpt is the longest line that is quoted, in bytes.
const maxExcerpt = 200

// secretTag marks a value that came from a reference.
const secretTag = "!secret"

// parse reads one YAML document into a tree. A nil tree is an empty document.
func parse(src *source, data []byte) (*node, Problems) {
	c := converter{src: src}
	if len(data) > MaxFile {
		c.fail(1, 1, fmt.Sprintf("the file has %d bytes, more than the bound of %d", len(data), MaxFile), "")
		return nil, c.problems
	}
	root := c.parse(string(data))
	if len(c.problems) > 0 {
		return nil, c.problems
	}
	return root, nil
}

// converter makes nodes of goccy's syntax tree.
type converter struct {
	src      *source
	anchors  map[string]*node
	problems Problems
}

func (c *converter) fail(line, col int, what, fix string) {
	c.problems.add(Problem{Pos: c.src.pos(line, col), Severity: Error, What: what, Fix: fix, Excerpt: c.src.excerpt(line)})
}

func (c *converter) failAt(t *token.Token, what, fix string) {
	line, col := place(t)
	c.fail(line, col, what, fix)
}

func place(t *token.Token) (line, col int) {
	if t == nil || t.Position == nil {
		return 1, 1
	}
	return t.Position.Line, t.Position.Column
}

func (c *converter) parse(text string) (root *node) {
	defer func() { // the parser has been seen to panic on garbage
		if r := recover(); r != nil {
			root = nil
			c.fail(1, 1, fmt.Sprintf("cannot be parsed as YAML: %v", r), "")
		}
	}()
	tokens := lexer.Tokenize(text)
	if !c.bounded(tokens) {
		return nil
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		c.syntax(err)
		return nil
	}
	for _, doc := range file.Docs {
		if doc.Body == nil || doc.Body.Type() == ast.CommentType {
			continue
		}
		if doc.Body.Type() == ast.DirectiveType {
			continue // %YAML 1.2
		}
		if root != nil {
			c.failAt(doc.Body.GetToken(), "the file holds more than one YAML document", "remove everything after the second ---")
			return nil
		}
		root = c.convert(doc.Body, 0)
	}
	return root
}

// bounded checks what could drive the parser into deep recursion.
func (c *converter) bounded(tokens token.Tokens) bool {
	if len(tokens) > maxTokens {
		c.fail(1, 1, fmt.Sprintf("the file has more than %d tokens", maxTokens), "")
		return false
	}
	flow, run := 0, 0
	for _, t := range tokens {
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow = max(flow-1, 0)
		}
		switch t.Type {
		case token.SequenceEntryType, token.MappingKeyType, token.TagType, token.AnchorType:
			run++
		case token.StringType, token.MappingValueType:
			run = 0
		}
		if flow > maxDepth || run > maxTokens/10 || (run > maxDepth && sameLine(t)) {
			c.failAt(t, fmt.Sprintf("nested more than %d levels deep", maxDepth), "")
			return false
		}
	}
	return true
}

// sameLine reports whether t and the two tokens before it are on one line.
func sameLine(t *token.Token) bool {
	p := t.Prev
	return p != nil && p.Prev != nil && p.Prev.Position.Line == t.Position.Line
}

func (c *converter) syntax(err error) {
	var se *yaml.SyntaxError
	if errors.As(err, &se) {
		c.failAt(se.Token, se.Message, "")
		return
	}
	what, _, _ := strings.Cut(err.Error(), "\n")
	c.fail(1, 1, "cannot be parsed as YAML: "+what, "")
}

// convert makes the node of a and everything below it.
func (c *converter) convert(a ast.Node, depth int) *node {
	n := &node{src: c.src, size: 1}
	if a == nil {
		return n
	}
	n.line, n.col = place(a.GetToken())
	if depth > maxDepth {
		c.fail(n.line, n.col, fmt.Sprintf("nested more than %d levels deep", maxDepth), "")
		return n
	}
	if len(c.problems) >= maxProblems {
		return n
	}
	switch a := a.(type) {
	case *ast.NullNode:
		if a.Token.Type == token.NullType {
			n.text = a.Token.Value // written; otherwise the value is missing
		}
	case *ast.StringNode:
		n.kind, n.text = stringKind, a.Value
		n.quoted = a.Token.Type == token.SingleQuoteType || a.Token.Type == token.DoubleQuoteType
	case *ast.LiteralNode:
		n.kind, n.text, n.quoted = stringKind, a.Value.Value, true
	case *ast.IntegerNode:
		n.kind, n.text, n.number = intKind, a.Token.Value, fmt.Sprint(a.Value)
	case *ast.FloatNode:
		n.kind, n.text = floatKind, a.Token.Value
	case *ast.InfinityNode, *ast.NanNode:
		c.fail(n.line, n.col, "not a finite number", "write a number, or quote it if text is meant")
	case *ast.BoolNode:
		n.kind, n.text = boolKind, strconv.FormatBool(a.Value)
	case *ast.MappingNode:
		n.kind = mapKind
		if len(a.Values) > 0 { // the token of a block mapping is its first ':'
			n.line, n.col = place(a.Values[0].Key.GetToken())
		}
		c.mapping(n, a.Values, depth)
	case *ast.MappingValueNode:
		n.kind = mapKind
		n.line, n.col = place(a.Key.GetToken())
		c.mapping(n, []*ast.MappingValueNode{a}, depth)
	case *ast.SequenceNode:
		n.kind = listKind
		for _, v := range a.Values {
			item := c.convert(v, depth+1)
			n.items = append(n.items, item)
			c.grow(n, item)
		}
	case *ast.AnchorNode:
		n = c.convert(a.Value, depth+1)
		if c.anchors == nil {
			c.anchors = map[string]*node{}
		}
		c.anchors[a.Name.GetToken().Value] = n
	case *ast.AliasNode:
		name := a.Value.GetToken().Value
		target, ok := c.anchors[name]
		if !ok {
			c.fail(n.line, n.col, fmt.Sprintf("unknown alias *%s", name), "an alias must come after the end of the value it repeats")
			return n
		}
		return target
	case *ast.TagNode:
		return c.tagged(n, a, depth)
	default:
		c.fail(n.line, n.col, fmt.Sprintf("%s is not allowed here", strings.ToLower(a.Type().YAMLName())), "")
	}
	return n
}

func (c *converter) tagged(n *node, a *ast.TagNode, depth int) *node {
	tag := a.Start.Value
	v := c.convert(a.Value, depth+1)
	switch {
	case (tag == "!!str" || tag == secretTag) && v.kind != mapKind && v.kind != listKind:
		t := *v // may be shared by an anchor
		t.kind, t.quoted, t.secret = stringKind, true, tag == secretTag
		return &t
	case tag == "!!map" && v.kind == mapKind, tag == "!!seq" && v.kind == listKind,
		tag == "!!int" && v.kind == intKind, tag == "!!bool" && v.kind == boolKind:
		return v
	}
	c.fail(n.line, n.col, fmt.Sprintf("the tag %s is not supported", tag), "remove it")
	return n
}

func (c *converter) mapping(n *node, values []*ast.MappingValueNode, depth int) {
	seen := make(map[string]int, len(values))
	var merges []*node
	for _, mv := range values {
		line, col := place(mv.Key.GetToken())
		value := c.convert(mv.Value, depth+1)
		if mv.Key.IsMergeKey() {
			merges = append(merges, value)
			continue
		}
		key, ok := keyText(mv.Key)
		if !ok {
			c.fail(line, col, "a key must be plain text", "")
			continue
		}
		if value.line == 0 || value.kind == nullKind {
			value.line, value.col = line, col
		}
		if first, dup := seen[key]; dup {
			c.fail(line, col, fmt.Sprintf("key %q is written twice; the first is in line %d", key, first+c.src.base), "remove one of them")
			continue
		}
		seen[key] = line
		n.pairs = append(n.pairs, pair{key: key, line: line, col: col, value: value})
		c.grow(n, value)
	}
	for _, m := range merges {
		c.merge(n, m, seen)
	}
}

// merge adds what the mapping or mappings under the key << have and n lacks.
func (c *converter) merge(n, from *node, seen map[string]int) {
	switch from.kind {
	case mapKind:
		for _, p := range from.pairs {
			if _, dup := seen[p.key]; !dup {
				seen[p.key] = p.line
				n.pairs = append(n.pairs, p)
				c.grow(n, p.value)
			}
		}
	case listKind:
		for _, m := range from.items {
			if m.kind != mapKind {
				c.fail(m.line, m.col, "<< needs mappings", "")
				return
			}
			c.merge(n, m, seen)
		}
	default:
		c.fail(from.line, from.col, "<< needs a mapping, not "+from.kind.String(), "")
	}
}

// grow counts child as part of n and refuses what aliases blow up.
func (c *converter) grow(n, child *node) {
	n.size += child.size
	if n.size > maxNodes {
		n.size = maxNodes // keeps sums small
		if len(c.problems) == 0 {
			c.fail(n.line, n.col, fmt.Sprintf("aliases expand to more than %d values", maxNodes), "")
		}
	}
}

// keyText returns a key as text.
func keyText(k ast.MapKeyNode) (string, bool) {
	switch k := k.(type) {
	case *ast.StringNode:
		return k.Value, true
	case *ast.IntegerNode, *ast.BoolNode, *ast.FloatNode:
		return k.GetToken().Value, true
	}
	return "", false
}
