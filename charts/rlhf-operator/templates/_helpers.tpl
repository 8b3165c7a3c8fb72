{{- define "rlhf.name" -}}
{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- /* Cluster-wide names hold the namespace, so that two namespaced releases of one name do not meet. */ -}}
{{- define "rlhf.clusterName" -}}
{{ printf "%s-%s" .Release.Namespace (include "rlhf.name" .) }}
{{- end }}

{{- define "rlhf.selector" -}}
app.kubernetes.io/name: rlhf-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "rlhf.labels" -}}
{{ include "rlhf.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "rlhf.serviceAccount" -}}
{{- $name := .Values.serviceAccount.name | default (ternary (include "rlhf.name" .) "" .Values.serviceAccount.create) -}}
{{- if not $name }}{{ fail "serviceAccount.name is empty: name the existing ServiceAccount, or set serviceAccount.create to true" }}{{ end -}}
{{- if hasSuffix "-driver" $name }}{{ fail (printf "the operator's ServiceAccount would be named %s: names that end in -driver belong to the jobs' drivers, and driverPolicy would refuse its status writes; set serviceAccount.name" $name) }}{{ end -}}
{{ $name }}
{{- end }}

{{- /* Empty where jobs inherit nothing. */ -}}
{{- define "rlhf.presets" -}}
{{- $presets := dict -}}
{{- with .Values.jobs.image }}{{ $_ := set $presets "image" . }}{{ end -}}
{{- with .Values.jobs.pods }}{{ $_ := set $presets "pods" . }}{{ end -}}
{{- if $presets }}{{ toYaml $presets }}{{ end -}}
{{- end }}

{{- define "rlhf.image" -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}

{{- /* Of every container of this chart. */ -}}
{{- define "rlhf.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
