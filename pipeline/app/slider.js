// Called with the same elements at each change of the data, so the slider keeps its position when the mask changes.
export default function ({ data, parentElement }) {
  const frame = parentElement.querySelector(".frame");
  const input = frame.querySelector("input");
  for (const name of ["image", "layer"]) {
    const element = frame.querySelector(`.${name}`);
    if (element.src !== data[name]) element.src = data[name];
    element.width = data.width;
    element.height = data.height;
  }
  frame.querySelector(".image").alt = data.image_text;
  frame.querySelector(".layer").alt = data.layer_text;
  input.setAttribute("aria-label", `Left: ${data.image_text}; right: ${data.layer_text}`);
  // As wide as possible, but not higher than the screen.
  frame.style.maxWidth = `min(100%, calc(80vh * ${data.width / data.height}))`;
  input.oninput = () => frame.style.setProperty("--at", `${input.value}%`);
}
