package config

import (
	_ "embed"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"reflect"
	"strings"
)

// modelSource is where the descriptions in the schema come from.
//
//go:embed model.go
var modelSource string

// Schema returns a JSON Schema (2020-12) of the YAML file, for editors. Options
// of components are not described: they are the components' own.
func Schema() []byte {
	s := schemaWriter{docs: fieldDocs()}
	root := s.of(reflect.TypeFor[Config](), false)
	root["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	root["title"] = "Longhouse node"
	out, err := json.MarshalIndent(root, "", "  ")
	if err != nil {
		panic(err) // maps, strings and booleans only
	}
	return append(out, '\n')
}

// SchemaOf returns a JSON Schema (2020-12) of the options of a component whose
// configuration is a struct of v's type; v may be a pointer. Its tags default,
// validate and doc become the schema's words for the same, secrets are
// writeOnly.
func SchemaOf(v any) []byte {
	t := reflect.TypeOf(v)
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	root := map[string]any{"type": "object", "properties": map[string]any{}, "additionalProperties": false}
	if t != nil && t.Kind() == reflect.Struct {
		root = schemaWriter{}.of(t, false)
	}
	root["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	out, err := json.Marshal(root)
	if err != nil {
		panic(err) // maps, slices, strings, numbers and booleans only
	}
	return out
}

type schemaWriter struct {
	docs map[string]string // Type.Field to its comment
}

func (s schemaWriter) of(t reflect.Type, sized bool) map[string]any {
	switch t {
	case durationType:
		return map[string]any{"type": []string{"string", "integer"}, "pattern": durationPattern, "minimum": 0, "maximum": 0, "examples": []string{"500ms", "30s"}}
	case reflect.TypeFor[Bytes]():
		return bytesSchema()
	case secretType:
		return map[string]any{"type": "string", "writeOnly": true}
	case reflect.TypeFor[Component]():
		return map[string]any{"oneOf": []any{
			map[string]any{"type": "string"},
			map[string]any{"type": "object", "additionalProperties": true, "properties": map[string]any{
				"use":  map[string]any{"type": "string", "description": "The name of the component."},
				"mode": map[string]any{"enum": modes[1:], "description": "Where a plugin runs."},
			}},
		}}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.of(t.Elem(), sized)
	case reflect.Slice:
		return map[string]any{"type": "array", "items": s.of(t.Elem(), sized)}
	case reflect.Map:
		return map[string]any{"type": "object", "additionalProperties": s.of(t.Elem(), sized)}
	case reflect.Interface:
		return map[string]any{}
	case reflect.Float32, reflect.Float64:
		return map[string]any{"type": "number"}
	case reflect.Struct:
		if !plainStruct(t) {
			return map[string]any{"type": "string"} // it reads itself
		}
		props := map[string]any{}
		var required []string
		fields := fieldsOf(t)
		for _, name := range fields.names {
			f := t.FieldByIndex(fields.byName[name].index)
			p := s.of(f.Type, fields.byName[name].sized)
			if doc := s.docs[t.Name()+"."+f.Name]; doc != "" {
				p["description"] = doc
			}
			if annotate(p, f.Type, fields.byName[name]) {
				required = append(required, name)
			}
			props[name] = p
		}
		object := map[string]any{"type": "object", "properties": props, "additionalProperties": false}
		if len(required) > 0 {
			object["required"] = required
		}
		return object
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.String:
		return map[string]any{"type": "string"}
	}
	if reflect.PointerTo(t).Implements(textUnmarshalerType) {
		return map[string]any{"type": "string"}
	}
	if sized {
		return bytesSchema()
	}
	integer := map[string]any{"type": "integer"}
	switch bits := t.Bits(); {
	case t.Kind() >= reflect.Uint && t.Kind() <= reflect.Uint64:
		integer["minimum"] = 0
		if bits < 64 {
			integer["maximum"] = uint64(1)<<bits - 1
		}
	case bits < 64:
		integer["minimum"], integer["maximum"] = -int64(1)<<(bits-1), int64(1)<<(bits-1)-1
	}
	return integer
}

const (
	durationPattern = `^[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+$|^[+-]?0$`
	bytesPattern    = `^\s*[0-9]+\s*(GiB|MiB|KiB|GB|MB|kB|KB|B)?\s*$`
)

func bytesSchema() map[string]any {
	return map[string]any{"type": []string{"integer", "string"}, "minimum": 0, "pattern": bytesPattern, "examples": []string{"64MiB"}}
}

// annotate adds what a field's tags say to its schema, and reports whether the
// field must be written.
func annotate(p map[string]any, t reflect.Type, f field) (required bool) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if doc := f.tag.Get("doc"); doc != "" {
		p["description"] = doc
	}
	text, hasDefault := f.tag.Lookup("default")
	if hasDefault {
		if n, err := tagNode(t, text); err == nil {
			p["default"] = n.plain()
		}
	}
	r, err := rulesOf(f.tag.Get("validate"))
	if err != nil {
		return false // Defaults and Decode say so
	}
	if len(r.oneof) > 0 {
		known := make([]any, len(r.oneof))
		for i, word := range r.oneof {
			known[i] = word
			if n, err := tagNode(t, word); err == nil && t.Kind() != reflect.Slice {
				known[i] = n.plain()
			}
		}
		if items, ok := p["items"].(map[string]any); ok {
			items["enum"] = known
		} else {
			p["enum"] = known
		}
	}
	words := [2]string{"minimum", "maximum"}
	switch {
	case t == durationType, t == reflect.TypeFor[Bytes](), f.sized:
		// The bounds have units, which JSON Schema cannot compare.
		words = [2]string{"x-minimum", "x-maximum"}
	case t == secretType, t.Kind() == reflect.String:
		words = [2]string{"minLength", "maxLength"}
	case t.Kind() == reflect.Slice:
		words = [2]string{"minItems", "maxItems"}
	case t.Kind() == reflect.Map:
		words = [2]string{"minProperties", "maxProperties"}
	}
	for i, bound := range []string{r.min, r.max} {
		if bound == "" {
			continue
		}
		if strings.HasPrefix(words[i], "x-") {
			p[words[i]] = bound
		} else {
			p[words[i]] = json.Number(bound)
		}
	}
	return r.required && !hasDefault
}

// fieldDocs reads the comments of the model's fields from its source.
func fieldDocs() map[string]string {
	docs := map[string]string{}
	file, err := parser.ParseFile(token.NewFileSet(), "model.go", modelSource, parser.ParseComments)
	if err != nil {
		return docs // a schema without descriptions
	}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		st, ok := spec.Type.(*ast.StructType)
		if !ok {
			return false
		}
		for _, f := range st.Fields.List {
			for _, name := range f.Names {
				docs[spec.Name.Name+"."+name.Name] = strings.Join(strings.Fields(f.Doc.Text()), " ")
			}
		}
		return false
	})
	return docs
}
